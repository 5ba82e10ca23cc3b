// Computes alpha and beta of sixteen pairs. A source fills the cells and receives the weights of the gradient.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"

namespace unigd {

// Rows of x, aligned with one group of lanes.
struct Unit {
  int64_t rows = 0, columns = 0;  // of the longest lane
  int64_t x_length[kLanes], y_length[kLanes];
  double log_k[kLanes];
  double scale[kLanes];         // c of u = c d^2
  double grad[kLanes] = {};     // dL/dlogK
  double by_log_scale = 0;      // output: dL/dlog c
};

struct Settings {
  bool gaussian;
  double linear_limit;  // nats
};

template <typename T> struct Limits;
template <> struct Limits<float> {
  static constexpr float cap = 1e30f, cancellation = 2e-2f, largest_u = 80;  // up to here exp(-u) is normal
};
template <> struct Limits<double> {
  static constexpr double cap = 1e290, cancellation = 1e-3, largest_u = 700;
};

// Cells held at once for one unit: 4 Mi cells, 16 MB in float. A larger unit is processed in runs of rows.
constexpr int64_t kMostCells = int64_t(1) << 22;

// Plain double arithmetic is safe if no value can leave its range. With l >= -log kappa for every cell, alpha lies in
// [exp(-l max(n, m)), D(n, m)] and beta / K in [exp(-l max(n, m)) / D(n, m), exp(l max(n, m))], because the shortest
// alignment has max(n, m) cells, kappa <= 1 and alpha beta <= K. D(n, m) <= (1 + sqrt 2)^(n + m) by induction on its
// recursion. The sum below therefore bounds every |log|. Doubles hold 708 nats.
template <typename T> bool linear_is_safe(const Settings& s, T max_u, int64_t n, int64_t m) {
  if (!(max_u <= Limits<T>::largest_u)) return false;
  const double u = max_u, l = s.gaussian ? u + std::log(2 - std::exp(-u)) : u;
  return l * std::max(n, m) + 0.8813735870195430 * (n + m) <= s.linear_limit;
}

template <typename T> class Recursion {
 public:
  Recursion(const LaneKernels<T>& kernels, Settings settings) : kernels_(kernels), settings_(settings) {}

  // The source has fill(begin, end, cells, &max_u), which writes u of these rows, and drain(begin, end, cells), which
  // receives dL/dd^2. The rows of the units are consecutive. Several units are given only if all of them fit.
  template <typename Source>
  void run(Source& source, std::vector<Unit>& units, int64_t stride, bool backward) {
    int64_t rows = 0, longest = 0;
    for (const Unit& unit : units) rows += unit.rows, longest = std::max(longest, unit.rows);
    const int64_t columns = units[0].columns;
    stride_ = stride;
    if (units.size() == 1 && rows * stride > kMostCells) return run_in_parts(source, units[0], backward);
    cells_.resize((rows + 7) * stride);  // products use multiples of 8 rows
    for (bool logarithm = false;; logarithm = true) {
      T max_u = 0;
      source.fill(0, rows, cells_.data(), &max_u);
      logarithm = logarithm || !linear_is_safe(settings_, max_u, longest, columns);
      bool certified = true;
      T* cells = cells_.data();
      if (backward) u_.assign(cells_.begin(), cells_.begin() + rows * stride);
      for (Unit& unit : units) {
        apply_local_kernel(cells, unit.rows, columns, logarithm);
        start(columns, logarithm, backward ? unit.rows : 1);
        forward(unit, cells, 0, unit.rows, logarithm, backward);
        if (backward) {
          start_backward(unit, logarithm);
          this->backward(unit, cells, u_.data() + (cells - cells_.data()), 0, unit.rows, logarithm);
          certified = certified && certificate(logarithm);
        }
        cells += unit.rows * stride;
      }
      if (certified || logarithm) break;
    }
    if (backward) source.drain(0, rows, cells_.data());
  }

 private:
  // Processes a unit that is too large to hold, in logarithms. The forward keeps alpha at the start of each part, and
  // the backward recomputes the parts from the last to the first.
  template <typename Source> void run_in_parts(Source& source, Unit& unit, bool backward) {
    const int64_t part = std::max<int64_t>(8, kMostCells / stride_ / 8 * 8), width = unit.columns * kLanes;
    cells_.resize(part * stride_);
    std::vector<double> checkpoints;
    T max_u = 0;
    start(unit.columns, true, 1);
    for (int64_t begin = 0; begin < unit.rows; begin += part) {
      const int64_t end = std::min(unit.rows, begin + part);
      if (backward) checkpoints.insert(checkpoints.end(), alpha_.begin() + width, alpha_.begin() + 2 * width);
      source.fill(begin, end, cells_.data(), &max_u);
      apply_local_kernel(cells_.data(), end - begin, unit.columns, true);
      forward(unit, cells_.data(), begin, end, true, false);
    }
    if (!backward) return;
    start(unit.columns, true, part);
    start_backward(unit, true);
    for (int64_t begin = (unit.rows - 1) / part * part; begin >= 0; begin -= part) {
      const int64_t end = std::min(unit.rows, begin + part);
      std::copy_n(checkpoints.begin() + begin / part * width, width, alpha_.begin());
      source.fill(begin, end, cells_.data(), &max_u);
      u_.assign(cells_.begin(), cells_.begin() + (end - begin) * stride_);
      apply_local_kernel(cells_.data(), end - begin, unit.columns, true);
      forward(unit, cells_.data(), begin, end, true, true);
      this->backward(unit, cells_.data(), u_.data(), begin, end, true);
      source.drain(begin, end, cells_.data());
    }
  }

  void apply_local_kernel(T* cells, int64_t rows, int64_t columns, bool logarithm) {
    for (int64_t r = 0; r < rows; r++) kernels_.local_kernel(cells + r * stride_, columns, settings_.gaussian, logarithm);
  }

  // alpha_ holds the row before the first one, then `rows` rows.
  void start(int64_t columns, bool logarithm, int64_t rows) {
    alpha_.resize((rows + 1) * columns * kLanes);
    std::fill_n(alpha_.begin(), (rows == 1 ? 2 : 1) * columns * kLanes, logarithm ? kLogZero : 0.0);
  }
  void start_backward(Unit& unit, bool logarithm) {
    below_.assign(unit.columns * kLanes, logarithm ? kLogZero : 0.0);
    seeds_.resize(unit.columns * kLanes);
    unit.by_log_scale = 0;
  }

  // Rows [begin, end), in runs that end where the x of a lane ends, so that its result can be read. Without `keep` only
  // the last row of alpha is kept, in place.
  void forward(Unit& unit, const T* cells, int64_t begin, int64_t end, bool logarithm, bool keep) {
    const int64_t width = unit.columns * kLanes;
    double* alpha = alpha_.data() + width;
    for (int64_t i = begin, stop; i < end; i = stop) {
      stop = end;
      for (int64_t length : unit.x_length)
        if (length > i) stop = std::min(stop, length);
      const double* before = keep ? alpha + (i - begin - 1) * width : alpha;
      double* rows = keep ? alpha + (i - begin) * width : alpha;
      kernels_.forward(cells + (i - begin) * stride_, stride_, stop - i, unit.columns, logarithm, i == 0, before, rows,
                       keep ? width : 0);
      const double* last = keep ? alpha + (stop - begin - 1) * width : alpha;
      for (int l = 0; l < kLanes; l++)
        if (unit.x_length[l] == stop) {
          const double a = last[(unit.y_length[l] - 1) * kLanes + l];
          unit.log_k[l] = logarithm ? a : std::log(a);
        }
    }
  }

  // Rows [begin, end) from last to first, in runs that end where the x of a lane ends, so that it can be seeded.
  void backward(Unit& unit, T* cells, const T* u, int64_t begin, int64_t end, bool logarithm) {
    const int64_t width = unit.columns * kLanes;
    const double* alpha = alpha_.data() + width;
    double coefficient[kLanes], by_u[kLanes] = {};
    for (int l = 0; l < kLanes; l++) coefficient[l] = -unit.grad[l] * unit.scale[l];
    for (int64_t stop = end, i; stop > begin; stop = i) {
      i = begin;
      bool seeded = false;
      for (int64_t length : unit.x_length) {
        if (length < stop) i = std::max(i, length);
        seeded = seeded || length == stop;
      }
      if (seeded) {
        std::fill(seeds_.begin(), seeds_.end(), logarithm ? kLogZero : 0.0);
        for (int l = 0; l < kLanes; l++)
          if (unit.x_length[l] == stop)
            seeds_[(unit.y_length[l] - 1) * kLanes + l] = logarithm ? -unit.log_k[l] : std::exp(-unit.log_k[l]);
      }
      const int64_t at = (i - begin) * stride_;
      kernels_.backward(cells + at, u + at, stride_, stop - i, unit.columns, settings_.gaussian, logarithm,
                        alpha + (i - begin) * width, width, below_.data(), seeded ? seeds_.data() : nullptr,
                        coefficient, by_u);
    }
    for (int l = 0; l < kLanes; l++)
      if (unit.scale[l] > 0) unit.by_log_scale += by_u[l] / unit.scale[l];
  }

  // All alignments start in cell (0, 0), so kappa beta / K must be 1 there. The two sweeps compute K and beta separately.
  bool certificate(bool logarithm) const {
    for (int l = 0; l < kLanes; l++)
      if (!logarithm && !(std::abs(below_[l] - 1) < 1e-3)) return false;
    return true;
  }

  const LaneKernels<T> kernels_;
  const Settings settings_;
  int64_t stride_ = 0;
  std::vector<T> cells_, u_;
  std::vector<double> alpha_, below_, seeds_;
};

}  // namespace unigd
