// The vector kernels process sixteen pairs of sequences at once, one pair per lane.
//
// Sixteen sequences y are interleaved, with slice j of all sixteen side by side, so that one matrix product with the rows
// of x gives the cells (i, j) of sixteen pairs in one vector. A cell beyond the lengths of its lane cannot reach the
// result at (length x - 1, length y - 1), so nothing is masked. This file uses neither torch nor the STL: it is compiled
// once per instruction set, and the linker could take an inline function from the wrong translation unit.
#pragma once
#include <cstdint>

namespace unigd {

constexpr int kLanes = 16;

// The log of zero, for cells that no alignment reaches. The sum of two such values is finite.
constexpr double kLogZero = -1e300;

template <typename T>
struct LaneKernels {
  // u = min(scale[lane] * max(row_norm + column_norms - 2 dot, 0), cap), where `mask` is null or not zero. Updates
  // *max_u. Returns whether a squared distance is below `cancellation` times its norms. dot and u may be the same.
  bool (*scaled_distances)(const T* dot, T* u, int64_t columns, T row_norm, const T* column_norms, const T* mask,
                           const T* scale, T cancellation, T cap, T* max_u);
  // Replaces u by kappa, or by log kappa.
  void (*local_kernel)(T* u, int64_t columns, bool gaussian, bool logarithm);
  // Computes alpha of `rows` rows, given the row before them. `first` means that the sequences start with these rows.
  // With alpha_stride 0 only the last row is kept, and `before` may be `alpha`.
  void (*forward)(const T* cells, int64_t stride, int64_t rows, int64_t columns, bool logarithm, bool first,
                  const double* before, double* alpha, int64_t alpha_stride);
  // Replaces kappa by weight = coefficient * alpha beta / K * (1 + kappa, or 1), from the last row to the first. `below`
  // holds kappa beta / K of the next row at the start and of row 0 at the end. `seeds` start beta / K in the last row.
  // by_u[lane] += weight * u.
  void (*backward)(T* cells, const T* u, int64_t stride, int64_t rows, int64_t columns, bool gaussian, bool logarithm,
                   const double* alpha, int64_t alpha_stride, double* below, const double* seeds,
                   const double* coefficient, double* by_u);
  // For one row: masked = v * mask if there is a mask, column_sums += masked. Returns the sum of the row.
  T (*sums)(const T* v, const T* mask, T* masked, int64_t columns, T* column_sums);
};

namespace baseline {
template <typename T> LaneKernels<T> kernels();
}
#if defined(__x86_64__)
namespace avx2 {
template <typename T> LaneKernels<T> kernels();
}
namespace avx512 {
template <typename T> LaneKernels<T> kernels();
}
#endif

}  // namespace unigd
