// Given pairs, sixteen at a time, with one small matrix product per pair.
#pragma once
#include "gram.h"

namespace unigd {

template <typename T> class Pairs {
 public:
  Pairs(const Side<T>& x, const Side<T>& y, const int64_t* pairs, int64_t count, const ColumnRanges& ranges,
        Scale scale, const LaneKernels<T>& kernels, Settings settings, T* log_k, const T* grad)
      : x_(x),
        y_(y),
        pairs_(pairs),
        count_(count),
        ranges_(ranges),
        scale_(scale),
        kernels_(kernels),
        settings_(settings),
        log_k_(log_k),
        grad_(grad) {}

  void run(Gradients<T>* gradients, bool one_thread) {
    gradients_ = gradients;
    order_.resize(count_);
    for (int64_t k = 0; k < count_; k++) order_[k] = k;
    auto cells = [&](int64_t k) { return x_.length(pairs_[2 * k]) * y_.length(pairs_[2 * k + 1]); };
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return cells(a) > cells(b); });
    const int64_t workers = one_thread ? 1 : at::get_num_threads();
    std::atomic<int64_t> next{0};
    at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      at::NoGradGuard no_grad;
      for (int64_t worker = begin; worker < end; worker++) {
        Group group(*this);
        for (int64_t first; (first = kLanes * next++) < count_;) group.run(first);
      }
    });
  }

 private:
  class Group {
   public:
    explicit Group(Pairs& pairs) : p_(pairs), recursion_(pairs.kernels_, pairs.settings_) {}

    void run(int64_t first) {
      std::vector<Unit> units(1);
      Unit& unit = units[0];
      used_ = std::min<int64_t>(kLanes, p_.count_ - first);
      for (int l = 0; l < kLanes; l++) {
        const int64_t k = p_.order_[first + std::min<int64_t>(l, used_ - 1)];  // spare lanes repeat the last pair
        i_[l] = p_.pairs_[2 * k];
        j_[l] = p_.pairs_[2 * k + 1];
        unit.x_length[l] = p_.x_.length(i_[l]);
        unit.y_length[l] = p_.y_.length(j_[l]);
        unit.rows = std::max(unit.rows, unit.x_length[l]);
        unit.columns = std::max(unit.columns, unit.y_length[l]);
        unit.scale[l] = scale_[l] = p_.scale_.template of<T>(unit.x_length[l], unit.y_length[l]);
        unit.grad[l] = p_.grad_ && l < used_ ? p_.grad_[k] : 0;
      }
      stride_ = unit.columns * kLanes;
      recursion_.run(*this, units, stride_, p_.grad_ != nullptr);
      if (p_.grad_) {
        std::lock_guard<std::mutex> lock(p_.lock_);
        p_.gradients_->by_log_scale += unit.by_log_scale;
      }
      for (int64_t l = 0; l < used_ && p_.log_k_; l++) p_.log_k_[p_.order_[first + l]] = unit.log_k[l];
    }

    void fill(int64_t begin, int64_t end, T* cells, T* max_u) {
      std::fill_n(cells, (end - begin) * stride_, T(0));
      for (int l = 0; l < kLanes; l++)
        for (int64_t s = 0; s < p_.ranges_.count(); s++) {
          const int64_t rows = std::min(end, p_.x_.length(i_[l])) - begin, columns = p_.y_.length(j_[l]);
          if (rows <= 0) continue;
          const auto [start, stop] = p_.ranges_.bounds[s];
          const int64_t r0 = p_.x_.offsets[i_[l]] + begin, c0 = p_.y_.offsets[j_[l]];
          const at::Tensor dots = p_.x_.tensor.narrow(0, r0, rows).narrow(1, start, stop - start).mm(
              p_.y_.tensor.narrow(0, c0, columns).narrow(1, start, stop - start).t());
          const T* dot = dots.template const_data_ptr<T>();
          for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++) {
              if (!compared(r0 + r, c0 + c, s)) continue;
              const T norms = p_.x_.norms[s * p_.x_.total + r0 + r] + p_.y_.norms[s * p_.y_.total + c0 + c];
              T d2 = norms - 2 * dot[r * columns + c];
              if (d2 < Limits<T>::cancellation * norms)
                d2 = exact_distance(p_.x_.row(r0 + r), p_.y_.row(c0 + c), start, stop);
              const T u = std::min(scale_[l] * d2, Limits<T>::cap);
              *max_u = std::max(*max_u, u);
              cells[r * stride_ + c * kLanes + l] = u;
            }
        }
    }

    void drain(int64_t begin, int64_t end, const T* cells) {
      for (int l = 0; l < used_; l++)
        for (int64_t s = 0; s < p_.ranges_.count(); s++) {
          const int64_t rows = std::min(end, p_.x_.length(i_[l])) - begin, columns = p_.y_.length(j_[l]);
          if (rows <= 0) continue;
          const auto [start, stop] = p_.ranges_.bounds[s];
          const int64_t width = stop - start, r0 = p_.x_.offsets[i_[l]] + begin, c0 = p_.y_.offsets[j_[l]];
          at::Tensor v = at::empty({rows, columns}, p_.x_.tensor.options());
          T* weights = v.template mutable_data_ptr<T>();
          for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < columns; c++)
              weights[r * columns + c] = compared(r0 + r, c0 + c, s) ? cells[r * stride_ + c * kLanes + l] : T(0);
          const at::Tensor x = p_.x_.tensor.narrow(0, r0, rows).narrow(1, start, width);
          const at::Tensor y = p_.y_.tensor.narrow(0, c0, columns).narrow(1, start, width);
          const at::Tensor to_x = (v.sum(1, true) * x - v.mm(y)) * 2, to_y = (v.sum(0).unsqueeze(1) * y - v.t().mm(x)) * 2;
          std::lock_guard<std::mutex> lock(p_.lock_);
          p_.add(p_.gradients_->dx, p_.x_, r0, start, to_x);
          p_.add(p_.gradients_->dy, p_.y_, c0, start, to_y);
        }
    }

   private:
    bool compared(int64_t row, int64_t column, int64_t s) const {
      return p_.ranges_.single || p_.ranges_.compared[s][p_.x_.modalities[row]][p_.y_.modalities[column]];
    }

    Pairs& p_;
    Recursion<T> recursion_;
    int64_t used_ = 0, stride_ = 0, i_[kLanes], j_[kLanes];
    T scale_[kLanes];
  };

  void add(T* gradient, const Side<T>& side, int64_t row, int64_t column, const at::Tensor& values) {
    at::from_blob(gradient + row * side.d + column, values.sizes(), {side.d, 1}, values.options()).add_(values);
  }

  const Side<T>&x_, &y_;
  const int64_t* pairs_;
  const int64_t count_;
  const ColumnRanges& ranges_;
  const Scale scale_;
  const LaneKernels<T> kernels_;
  const Settings settings_;
  T* const log_k_;
  const T* const grad_;
  Gradients<T>* gradients_ = nullptr;
  std::vector<int64_t> order_;
  std::mutex lock_;
};

}  // namespace unigd
