// All pairs: each block of rows of x against every group of lanes.
#pragma once
#include <atomic>
#include <memory>
#include <mutex>

#include "gemm.h"
#include "sides.h"

namespace unigd {

// c in u = c d^2 for a pair: the scale, divided by the mean length if the bandwidth is per pair.
struct Scale {
  double scale;
  bool per_pair;

  template <typename T> T of(int64_t n, int64_t m) const {
    return std::min(per_pair ? scale * 2 / (n + m) : scale, double(Limits<T>::cap));
  }
};

template <typename T> struct Gradients {
  T *dx, *dy;  // in the order of the sequences; the same pointer for a symmetric problem
  double by_log_scale = 0;
};

// Cells per block of several sequences, so that u, kappa and the gradient of a block stay in the L2 cache.
constexpr int64_t kBlockCells = 1 << 17;

template <typename T> class Gram {
 public:
  Gram(const Side<T>& x, const Side<T>& y, bool symmetric, const ColumnRanges& ranges, Scale scale,
       const LaneKernels<T>& kernels, Settings settings, bool blocks, T* log_k, const T* grad)
      : x_(x),
        y_(y),
        symmetric_(symmetric),
        ranges_(ranges),
        scale_(scale),
        kernels_(kernels),
        settings_(settings),
        blocks_(blocks),
        log_k_(log_k),
        grad_(grad) {}

  void run(Gradients<T>* gradients, bool one_thread) {
    const int64_t groups = (y_.count + kLanes - 1) / kLanes;
    groups_.resize(groups);
    at::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) groups_[b] = interleave(y_, b * kLanes, ranges_, grad_ != nullptr);
    });
    if (grad_) {
      locks_ = std::make_unique<std::mutex[]>(groups);
      for (const LaneGroup<T>& group : groups_) {
        products_.push_back(at::zeros({y_.d, group.stride}, y_.tensor.options()));
        sums_.emplace_back(ranges_.count() * group.stride, T(0));
      }
    }
    gradients_ = gradients;
    const std::vector<int64_t> starts = block_starts();
    const int64_t workers = one_thread ? 1 : at::get_num_threads();
    std::atomic<int64_t> next{0};
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      at::NoGradGuard no_grad;
      for (int64_t worker = begin; worker < end; worker++) {
        Block block(*this);
        for (int64_t k; (k = next++) + 1 < int64_t(starts.size());) block.run(starts[k], starts[k + 1]);
      }
#ifdef CPUBLAS_BRGEMM_F32F32F32
      if (blocks_) at::native::cpublas::brgemm_release(x_.narrow.defined());
#endif
    });
    if (grad_) finish();
  }

 private:
  // Divides the sequences of x into blocks, with several blocks per thread if possible.
  std::vector<int64_t> block_starts() const {
    const int64_t fair = std::max<int64_t>(16, x_.total / (4 * at::get_num_threads()));
    const int64_t rows = std::min(fair, std::max<int64_t>(16, kBlockCells / (y_.length(0) * kLanes)));
    std::vector<int64_t> starts{0};
    for (int64_t i = 1; i < x_.count; i++)
      if (x_.offsets[i + 1] - x_.offsets[starts.back()] > rows) starts.push_back(i);
    starts.push_back(x_.count);
    return starts;
  }

  // The work of one thread: fills the cells for the recursion and computes the gradient of the block's rows.
  class Block {
   public:
    explicit Block(Gram& gram) : g_(gram), recursion_(gram.kernels_, gram.settings_) {}

    void run(int64_t first, int64_t last) {
      first_ = first;
      row0_ = g_.x_.offsets[first];
      rows_ = g_.x_.offsets[last] - row0_;
      const int64_t d = g_.x_.d;
      if (g_.grad_) {
        row_stride_ = stride_of(rows_);
        transposed_.resize(d * row_stride_);
        for (int64_t r = 0; r < rows_; r++)
          for (int64_t k = 0; k < d; k++) transposed_[k * row_stride_ + r] = g_.x_.row(row0_ + r)[k];
        products_.assign((rows_ + 7) * d, T(0));
        sums_.assign(g_.ranges_.count() * rows_, T(0));
      }
      for (int64_t b = g_.symmetric_ ? first / kLanes : 0; b < int64_t(g_.groups_.size()); b++) align(b, last);
      if (g_.grad_) add_row_gradient();
    }

    void fill(int64_t begin, int64_t end, T* cells, T* max_u) {
      const LaneGroup<T>& group = g_.groups_[b_];
      const int64_t rows = end - begin, width = group.columns * kLanes, from = row0_ + begin;
      // Rounded up to a multiple of 8, within the rows that exist, so that fewer shapes are compiled.
      const int64_t height = std::min((rows + 7) / 8 * 8, g_.x_.total - from);
      T* dots = cells;
      if (!g_.ranges_.single) {
        other_.resize((rows + 7) * group.stride);
        dots = other_.data();
        std::fill_n(cells, rows * group.stride, T(0));
      }
      for (int64_t s = 0; s < g_.ranges_.count(); s++) {
        const auto [start, stop] = g_.ranges_.bounds[s];
        multiply(height, width, from, start, stop, dots);
        const T* norms = group.norms.data() + s * group.stride;
        int64_t i = first_ + (std::upper_bound(g_.x_.offsets + first_, g_.x_.offsets + g_.x_.count, from) -
                              (g_.x_.offsets + first_)) - 1;
        for (int64_t r = 0; r < rows; r++) {
          while (from + r >= g_.x_.offsets[i + 1]) i++;
          const T* mask = g_.x_.modalities ? group.mask(s, g_.x_.modalities[from + r]) : nullptr;
          T* u = cells + r * group.stride;
          const T* scale = scales_.data() + (i - first_) * kLanes;
          const T norm = g_.x_.norms[s * g_.x_.total + from + r];
          if (g_.kernels_.scaled_distances(dots + r * group.stride, u, group.columns, norm, norms, mask, scale,
                                           Limits<T>::cancellation, Limits<T>::cap, max_u))
            refine(from + r, s, norm, norms, mask, scale, u, max_u);
        }
      }
    }

    void drain(int64_t begin, int64_t end, T* cells) {
      const LaneGroup<T>& group = g_.groups_[b_];
      const int64_t rows = end - begin, width = group.columns * kLanes, d = g_.x_.d;
      column_sums_.assign(g_.ranges_.count() * group.stride, T(0));
      for (int64_t s = 0; s < g_.ranges_.count(); s++) {
        T* v = g_.ranges_.single ? cells : other_.data();
        for (int64_t r = 0; r < rows; r++) {
          const T* mask = g_.x_.modalities ? group.mask(s, g_.x_.modalities[row0_ + begin + r]) : nullptr;
          sums_[s * rows_ + begin + r] +=
              g_.kernels_.sums(cells + r * group.stride, mask, v + r * group.stride, group.columns,
                               column_sums_.data() + s * group.stride);
        }
        const auto [start, stop] = g_.ranges_.bounds[s];
        gemm(g_.blocks_, (rows + 7) / 8 * 8, stop - start, width, v, group.stride,
             group.slices.template const_data_ptr<T>() + start, d, products_.data() + begin * d + start, d, true);
        std::lock_guard<std::mutex> lock(g_.locks_[b_]);
        gemm(g_.blocks_, stop - start, width, rows, transposed_.data() + start * row_stride_ + begin, row_stride_, v,
             group.stride, g_.products_[b_].template mutable_data_ptr<T>() + start * group.stride, group.stride, true);
        for (int64_t x = s * group.stride; x < s * group.stride + width; x++) g_.sums_[b_][x] += column_sums_[x];
      }
    }

   private:
    // Multiplies rows of x with all lanes in the columns [start, stop).
    void multiply(int64_t height, int64_t width, int64_t from, int64_t start, int64_t stop, T* dots) {
      const LaneGroup<T>& group = g_.groups_[b_];
      const int64_t d = g_.x_.d, offset = start * group.stride;
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
      if constexpr (std::is_same_v<T, float>)
        if (g_.x_.narrow.defined())
          return block_gemm(height, width, stop - start,
                            g_.x_.narrow.template const_data_ptr<c10::BFloat16>() + from * d + start, d,
                            group.transposed.template const_data_ptr<c10::BFloat16>() + offset, group.stride, dots,
                            group.stride, false);
#endif
      gemm(g_.blocks_, height, width, stop - start, g_.x_.row(from) + start, d,
           group.transposed.template const_data_ptr<T>() + offset, group.stride, dots, group.stride, false);
    }

    void align(int64_t b, int64_t last) {
      b_ = b;
      const LaneGroup<T>& group = g_.groups_[b];
      units_.resize(last - first_);
      scales_.resize(units_.size() * kLanes);
      for (int64_t i = first_; i < last; i++) {
        Unit& unit = units_[i - first_];
        unit.rows = g_.x_.length(i);
        unit.columns = group.columns;
        for (int l = 0; l < kLanes; l++) {
          unit.x_length[l] = unit.rows;
          unit.y_length[l] = group.length[l];
          unit.scale[l] = scales_[(i - first_) * kLanes + l] = g_.scale_.template of<T>(unit.rows, group.length[l]);
          unit.grad[l] = g_.grad_ ? weight(i, b * kLanes + l) : 0;
        }
      }
      recursion_.run(*this, units_, group.stride, g_.grad_ != nullptr);
      for (const Unit& unit : units_) by_log_scale_ += unit.by_log_scale;
      for (int64_t i = first_; i < last && g_.log_k_; i++)
        for (int64_t j = b * kLanes; j < std::min((b + 1) * kLanes, g_.y_.count); j++) {
          if (g_.symmetric_ && j < i) continue;
          const T value = units_[i - first_].log_k[j - b * kLanes];
          g_.log_k_[i * g_.y_.count + j] = value;
          if (g_.symmetric_) g_.log_k_[j * g_.y_.count + i] = value;
        }
    }

    double weight(int64_t i, int64_t j) const {
      const int64_t m = g_.y_.count;
      if (j >= m || (g_.symmetric_ && j < i)) return 0;
      const double g = g_.grad_[i * m + j];
      return g_.symmetric_ && i != j ? g + g_.grad_[j * m + i] : g;
    }

    void refine(int64_t row, int64_t s, T norm, const T* norms, const T* mask, const T* scale, T* u, T* max_u) {
      const LaneGroup<T>& group = g_.groups_[b_];
      const auto [start, stop] = g_.ranges_.bounds[s];
      for (int64_t j = 0; j < group.columns * kLanes; j += kLanes) {
        int any = 0;  // the norm of padding is -inf, so it is never close
        for (int l = 0; l < kLanes; l++) any |= u[j + l] <= scale[l] * Limits<T>::cancellation * (norm + norms[j + l]);
        for (int64_t x = j; any && x < j + kLanes; x++) {
          const T c = scale[x - j];
          if (u[x] <= c * Limits<T>::cancellation * (norm + norms[x]) && !(mask && mask[x] == 0)) {
            u[x] = std::min(c * exact_distance(g_.x_.row(row), g_.y_.row(group.source[x]), start, stop), Limits<T>::cap);
            *max_u = std::max(*max_u, u[x]);
          }
        }
      }
    }

    // With d(d^2)/dx = 2 (x - y), the gradient is 2 (sum(V) x - V y).
    void add_row_gradient() {
      const int64_t d = g_.x_.d;
      for (int64_t r = 0; r < rows_; r++) {
        const T* x = g_.x_.row(row0_ + r);
        const T* product = products_.data() + r * d;
        T* dx = g_.gradients_->dx + (row0_ + r) * d;
        for (int64_t k = 0; k < d; k++) dx[k] = -2 * product[k];
        for (int64_t s = 0; s < g_.ranges_.count(); s++) {
          const T sum = sums_[s * rows_ + r];
          const auto [start, stop] = g_.ranges_.bounds[s];
          for (int64_t k = start; k < stop; k++) dx[k] += 2 * sum * x[k];
        }
      }
      std::lock_guard<std::mutex> lock(g_.locks_[0]);
      g_.gradients_->by_log_scale += by_log_scale_;
      by_log_scale_ = 0;
    }

    Gram& g_;
    Recursion<T> recursion_;
    double by_log_scale_ = 0;
    int64_t first_ = 0, row0_ = 0, rows_ = 0, row_stride_ = 0, b_ = 0;
    std::vector<Unit> units_;
    std::vector<T> scales_, other_, transposed_, products_, sums_, column_sums_;
  };

  // Adds the gradient of y, which is accumulated per group of lanes.
  void finish() {
    at::parallel_for(0, groups_.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; b++) {
        const LaneGroup<T>& group = groups_[b];
        const T* products = products_[b].template const_data_ptr<T>();
        for (int64_t x = 0; x < group.columns * kLanes; x++) {
          if (group.source[x] < 0) continue;
          const T* y = y_.row(group.source[x]);
          T* dy = gradients_->dy + group.source[x] * y_.d;
          for (int64_t k = 0; k < y_.d; k++) dy[k] -= 2 * products[k * group.stride + x];
          for (int64_t s = 0; s < ranges_.count(); s++) {
            const T sum = sums_[b][s * group.stride + x];
            const auto [start, stop] = ranges_.bounds[s];
            for (int64_t k = start; k < stop; k++) dy[k] += 2 * sum * y[k];
          }
        }
      }
    });
  }

  const Side<T>&x_, &y_;
  const bool symmetric_;
  const ColumnRanges& ranges_;
  const Scale scale_;
  const LaneKernels<T> kernels_;
  const Settings settings_;
  const bool blocks_;
  T* const log_k_;
  const T* const grad_;
  Gradients<T>* gradients_ = nullptr;
  std::vector<LaneGroup<T>> groups_;
  std::unique_ptr<std::mutex[]> locks_;  // one per group, for the two vectors below
  std::vector<at::Tensor> products_;     // X^T V, (d, stride)
  std::vector<std::vector<T>> sums_;     // column sums of V, (ranges, stride)
};

}  // namespace unigd
