// The two sides of a problem: the sequences as given, and interleaved in groups of lanes.
#pragma once
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>
#include <limits>
#include <vector>

#include "recursion.h"

namespace unigd {

// The distinct column ranges, and whether two modalities are compared in each of them.
struct ColumnRanges {
  std::vector<std::pair<int64_t, int64_t>> bounds;
  std::vector<std::array<std::array<bool, 32>, 32>> compared;
  bool single = true;  // without modalities, all slices are compared in one range

  int64_t count() const { return bounds.size(); }
};

template <typename T> struct Side {
  at::Tensor tensor;  // (total, d)
  at::Tensor narrow;  // the same in bfloat16, if the input is bfloat16 and the processor multiplies it
  const T* slices;
  int64_t total, d, count;
  const int64_t* offsets;
  const int32_t* modalities;  // nullptr without modalities
  std::vector<T> norms;       // (ranges, total)

  Side(const at::Tensor& slices_, const at::Tensor& offsets_, const std::optional<at::Tensor>& modalities_,
       const ColumnRanges& ranges, bool bfloat16)
      : tensor(slices_),
        narrow(bfloat16 ? slices_.to(at::kBFloat16) : at::Tensor()),
        slices(slices_.const_data_ptr<T>()),
        total(slices_.size(0)),
        d(slices_.size(1)),
        count(offsets_.numel() - 1),
        offsets(offsets_.const_data_ptr<int64_t>()),
        modalities(modalities_ ? modalities_->const_data_ptr<int32_t>() : nullptr),
        norms(ranges.count() * total) {
    for (int64_t s = 0; s < ranges.count(); s++) {
      const auto [start, stop] = ranges.bounds[s];
      at::from_blob(norms.data() + s * total, {total}, slices_.options())
          .copy_(slices_.narrow(1, start, stop - start).square().sum(1));
    }
  }
  int64_t length(int64_t i) const { return offsets[i + 1] - offsets[i]; }
  const T* row(int64_t r) const { return slices + r * d; }
};

// Row strides of interleaved blocks. There are few different ones, because oneDNN compiles code for each, and none is a
// power of two from 64 on, because rows would then share cache sets. Blocks of short sequences are padded less.
inline int64_t stride_of(int64_t elements) {
  const int64_t step = elements < 256 ? 32 : 256;
  return elements <= 16 ? 16 : (elements + step - 1) / step * step + 16;
}

template <typename T> struct LaneGroup {
  int64_t columns = 0, stride = 0;
  int64_t length[kLanes];
  std::vector<int64_t> source;  // (columns * lanes): the row of the slice, or -1 for padding
  at::Tensor slices;            // (columns * lanes, d), for products with the gradient; only in a backward
  at::Tensor transposed;        // (d, stride), for products of slices; (d / 2, stride, 2) in bfloat16
  std::vector<T> norms;         // (ranges, stride); -inf for padding, whose u becomes 0
  std::vector<T> masks;         // (ranges, 32, stride): whether modality m of x is compared with the column in the
                                // range; empty without modalities

  const T* mask(int64_t range, int64_t modality) const {
    return masks.empty() ? nullptr : masks.data() + (range * 32 + modality) * stride;
  }
};

template <typename T>
LaneGroup<T> interleave(const Side<T>& y, int64_t first, const ColumnRanges& ranges, bool backward) {
  LaneGroup<T> group;
  group.columns = y.length(first);  // sequences are sorted, longest first
  group.stride = stride_of(group.columns * kLanes);
  group.source.assign(group.columns * kLanes, -1);
  group.norms.assign(ranges.count() * group.stride, -std::numeric_limits<T>::infinity());
  if (!ranges.single) group.masks.assign(ranges.count() * 32 * group.stride, T(0));
  const bool narrow = y.narrow.defined();
  group.transposed = at::empty({y.d, group.stride}, narrow ? y.narrow.options() : y.tensor.options());
  if (backward) group.slices = at::empty({group.columns * kLanes, y.d}, y.tensor.options());
  for (int l = 0; l < kLanes; l++) {
    const int64_t i = first + l;
    group.length[l] = i < y.count ? y.length(i) : 1;
    for (int64_t j = 0; i < y.count && j < group.length[l]; j++) {
      const int64_t row = y.offsets[i] + j, x = j * kLanes + l;
      group.source[x] = row;
      for (int64_t s = 0; s < ranges.count(); s++) {
        group.norms[s * group.stride + x] = y.norms[s * y.total + row];
        for (int m = 0; !ranges.single && m < 32; m++)
          group.masks[(s * 32 + m) * group.stride + x] = ranges.compared[s][m][y.modalities[row]];
      }
    }
  }
  const std::vector<T> zeros(y.d, T(0));
  for (int64_t j = 0; j < group.columns; j++) {
    const T* rows[kLanes];
    for (int l = 0; l < kLanes; l++) {
      const int64_t row = group.source[j * kLanes + l];
      rows[l] = row < 0 ? zeros.data() : y.row(row);
      if (backward) std::copy_n(rows[l], y.d, group.slices.template mutable_data_ptr<T>() + (j * kLanes + l) * y.d);
    }
    if (narrow) {
      c10::BFloat16* transposed = group.transposed.template mutable_data_ptr<c10::BFloat16>();
      for (int64_t k = 0; k < y.d; k++)
        for (int l = 0; l < kLanes; l++)
          transposed[(k / 2 * group.stride + j * kLanes + l) * 2 + k % 2] = c10::BFloat16(float(rows[l][k]));
    } else {
      T* transposed = group.transposed.template mutable_data_ptr<T>();
      for (int64_t k = 0; k < y.d; k++)
        for (int l = 0; l < kLanes; l++) transposed[k * group.stride + j * kLanes + l] = rows[l][k];
    }
  }
  return group;
}

// A squared distance computed from the difference, for pairs where the expanded square loses too many digits.
template <typename T> T exact_distance(const T* a, const T* b, int64_t start, int64_t stop) {
  T sum[8] = {};
  int64_t k = start;
  for (; k + 8 <= stop; k += 8)
    for (int t = 0; t < 8; t++) sum[t] += (a[k + t] - b[k + t]) * (a[k + t] - b[k + t]);
  for (; k < stop; k++) sum[0] += (a[k] - b[k]) * (a[k] - b[k]);
  return ((sum[0] + sum[1]) + (sum[2] + sum[3])) + ((sum[4] + sum[5]) + (sum[6] + sum[7]));
}

}  // namespace unigd
