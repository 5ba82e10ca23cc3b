// The vector kernels: sixteen pairs of sequences at once, one a lane.
//
// Sixteen sequences y are interleaved, slice j of all sixteen side by side, so that one matrix product with the rows
// of x yields the cells (i, j) of sixteen pairs in one vector. A cell beyond a lane's own lengths cannot reach its
// answer at (length x - 1, length y - 1), so nothing is masked. No torch and no STL here: each instruction set compiles
// this in its own translation unit, and an inline function shared with another would be linked from either.
#pragma once
#include <cstdint>

namespace unigd {

constexpr int kLanes = 16;

// log of "no alignment comes here"; sums of two stay finite.
constexpr double kNever = -1e300;

template <typename T>
struct LaneKernels {
  // u = min(scale[lane] * max(row_norm + column_norms - 2 dot, 0), cap), where mask (if any) is not zero.
  // Returns whether a distance is below `cancellation` of its norms; raises *max_u. dot and u may be the same.
  bool (*scaled_distances)(const T* dot, T* u, int64_t columns, T row_norm, const T* column_norms, const T* mask,
                           const T* scale, T cancellation, T cap, T* max_u);
  // In place: kappa of u, or log kappa.
  void (*local_kernel)(T* u, int64_t columns, bool gaussian, bool logarithm);
  // alpha of `rows` rows from the row before them. `first`: these rows start the sequences.
  // alpha_stride 0 keeps the last row only; `before` may then be `alpha`.
  void (*forward)(const T* cells, int64_t stride, int64_t rows, int64_t columns, bool logarithm, bool first,
                  const double* before, double* alpha, int64_t alpha_stride);
  // From kappa to weight = coefficient * alpha beta / K * (1 + kappa, or 1), in place, last row first. `below` holds
  // kappa beta / K of the row after and is left with that of row 0; `seeds` start beta / K in the last row.
  // by_u[lane] += weight * u.
  void (*backward)(T* cells, const T* u, int64_t stride, int64_t rows, int64_t columns, bool gaussian, bool logarithm,
                   const double* alpha, int64_t alpha_stride, double* below, const double* seeds,
                   const double* coefficient, double* by_u);
  // One row: masked = v * mask (where there is a mask), column_sums += it; returns its sum.
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
