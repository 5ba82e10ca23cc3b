// Implements lanes.h for one instruction set. UNIGD_ISA is its name and UNIGD_VECTOR_BYTES its vector width.
#include <cstring>

#include "lanes.h"

namespace unigd {
namespace UNIGD_ISA {
namespace {

#define UNIGD_INLINE static inline __attribute__((always_inline))

template <typename T> struct Types;
template <> struct Types<float> {
  typedef float Vector __attribute__((vector_size(UNIGD_VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(UNIGD_VECTOR_BYTES)));
  typedef int32_t Integer;
  static constexpr int mantissa_bits = 23, bias = 127, exp_terms = 7, log_terms = 5;
  static constexpr float shifter = 12582912.f;  // 1.5 * 2^23: adding it puts the rounded integer into the low bits
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f, smallest = -87.3f;
};
template <> struct Types<double> {
  typedef double Vector __attribute__((vector_size(UNIGD_VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(UNIGD_VECTOR_BYTES)));
  typedef int64_t Integer;
  static constexpr int mantissa_bits = 52, bias = 1023, exp_terms = 13, log_terms = 12;
  static constexpr double shifter = 6755399441055744.0;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10,
                          smallest = -708.0;
};
template <typename T> using Vector = typename Types<T>::Vector;
template <typename T> using Integers = typename Types<T>::Integers;
template <typename T> constexpr int kWidth = UNIGD_VECTOR_BYTES / sizeof(T);
template <typename T> constexpr int kParts = kLanes / kWidth<T>;  // vectors that hold one value per lane

template <typename T> UNIGD_INLINE Vector<T> load(const T* p) {
  Vector<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <typename T> UNIGD_INLINE void store(T* p, Vector<T> v) { std::memcpy(p, &v, sizeof v); }
template <typename T> UNIGD_INLINE Vector<T> broadcast(T x) { return Vector<T>{} + x; }
template <typename V> UNIGD_INLINE V larger(V a, V b) { return a > b ? a : b; }
template <typename V> UNIGD_INLINE V smaller(V a, V b) { return a < b ? a : b; }

// Load cells of either type as a vector of doubles, and store them.
UNIGD_INLINE Vector<double> load_double(const double* p) { return load(p); }
UNIGD_INLINE void store_double(double* p, Vector<double> v) { store(p, v); }
typedef float HalfVector __attribute__((vector_size(UNIGD_VECTOR_BYTES / 2)));
UNIGD_INLINE Vector<double> load_double(const float* p) {
  HalfVector v;
  std::memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Vector<double>);
}
UNIGD_INLINE void store_double(float* p, Vector<double> v) {
  HalfVector narrow = __builtin_convertvector(v, HalfVector);
  std::memcpy(p, &narrow, sizeof narrow);
}

// e^x for x <= 0. With x = n ln 2 + r and |r| <= ln 2 / 2, this is a Taylor series in r, and n goes into the exponent
// bits. Results that are not normal numbers become 0.
template <typename T> UNIGD_INLINE Vector<T> exp_of(Vector<T> x) {
  using C = Types<T>;
  Vector<T> clamped = larger(x, broadcast<T>(C::smallest));
  Vector<T> shifted = clamped * T(1.44269504088896340736) + C::shifter;
  Integers<T> bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  Vector<T> n = shifted - C::shifter;
  Vector<T> r = clamped - n * C::ln2_high - n * C::ln2_low;
  Vector<T> series = broadcast<T>(1);
#pragma GCC unroll 16
  for (int k = C::exp_terms; k >= 1; k--) series = series * r * (T(1) / k) + T(1);
  Integers<T> scale_bits = (bits + C::bias) << C::mantissa_bits;  // the bits of the shifter are shifted out
  Vector<T> scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  return x < C::smallest ? broadcast<T>(0) : series * scale;
}

// log x for normal x > 0. With x = 2^n m and m around 1, log m = 2 artanh((m - 1) / (m + 1)).
template <typename T> UNIGD_INLINE Vector<T> log_of(Vector<T> x) {
  using C = Types<T>;
  const T root_half = T(0.70710678118654752440);
  typename C::Integer root_half_bits;
  std::memcpy(&root_half_bits, &root_half, sizeof root_half);
  Integers<T> bits;
  std::memcpy(&bits, &x, sizeof bits);
  Integers<T> n = (bits - root_half_bits) >> C::mantissa_bits;
  Integers<T> m_bits = bits - (n << C::mantissa_bits);
  Vector<T> m;
  std::memcpy(&m, &m_bits, sizeof m);
  Vector<T> s = (m - T(1)) / (m + T(1)), square = s * s;
  Vector<T> series = broadcast<T>(T(1) / (2 * C::log_terms - 1));
#pragma GCC unroll 16
  for (int k = C::log_terms - 2; k >= 0; k--) series = series * square + T(1) / (2 * k + 1);
  Vector<T> exponent = __builtin_convertvector(n, Vector<T>);
  return exponent * C::ln2_high + (exponent * C::ln2_low + T(2) * s * series);
}

UNIGD_INLINE Vector<double> log_sum_exp(Vector<double> a, Vector<double> b, Vector<double> c) {
  // The largest of the three contributes exp(0) = 1, so two exponentials are enough.
  Vector<double> low = smaller(a, b), high = larger(a, b);
  Vector<double> top = larger(high, c), middle = larger(low, smaller(high, c)), bottom = smaller(low, c);
  return top + log_of<double>(1.0 + exp_of<double>(middle - top) + exp_of<double>(bottom - top));
}

template <typename T>
bool scaled_distances(const T* dot, T* u, int64_t columns, T row_norm, const T* column_norms, const T* mask,
                      const T* scale, T cancellation, T cap, T* max_u) {
  Integers<T> close = {};
  Vector<T> highest = broadcast<T>(*max_u);
  for (int64_t j = 0; j < columns; j++)
    for (int part = 0; part < kParts<T>; part++) {
      const int64_t x = j * kLanes + part * kWidth<T>;
      const Vector<T> norms = load(column_norms + x) + row_norm, d2 = norms - T(2) * load(dot + x);
      close |= d2 < norms * cancellation;
      Vector<T> value = larger(d2, broadcast<T>(0)) * load(scale + part * kWidth<T>);
      value = smaller(value, broadcast<T>(cap));
      if (mask) value = load(mask + x) != T(0) ? value : load(u + x);
      highest = larger(highest, value);
      store(u + x, value);
    }
  bool any = false;
  for (int k = 0; k < kWidth<T>; k++) {
    any |= close[k] != 0;
    if (highest[k] > *max_u) *max_u = highest[k];
  }
  return any;
}

template <typename T, bool gaussian, bool logarithm> void local_kernel_loop(T* u, int64_t count) {
  for (int64_t x = 0; x < count; x += kWidth<T>) {
    Vector<T> value = -load(u + x);
    if (gaussian) {
      Vector<T> e = exp_of<T>(value);
      value = logarithm ? value - log_of<T>(T(2) - e) : e / (T(2) - e);
    } else if (!logarithm) {
      value = exp_of<T>(value);
    }
    store(u + x, value);
  }
}
template <typename T> void local_kernel(T* u, int64_t columns, bool gaussian, bool logarithm) {
  const int64_t count = columns * kLanes;
  if (gaussian)
    logarithm ? local_kernel_loop<T, true, true>(u, count) : local_kernel_loop<T, true, false>(u, count);
  else
    logarithm ? local_kernel_loop<T, false, true>(u, count) : local_kernel_loop<T, false, false>(u, count);
}

template <typename T, bool logarithm>
void forward_loop(const T* cells, int64_t stride, int64_t rows, int64_t columns, bool first, const double* before,
                  double* alpha, int64_t alpha_stride) {
  constexpr int parts = kParts<double>, width = kWidth<double>;
  const double zero = logarithm ? kLogZero : 0;
  for (int64_t i = 0; i < rows; i++) {
    Vector<double> diagonal[parts], left[parts];
    for (int p = 0; p < parts; p++) {
      diagonal[p] = broadcast(first && i == 0 ? (logarithm ? 0.0 : 1.0) : zero);
      left[p] = broadcast(zero);
    }
    for (int64_t x = 0; x < columns * kLanes; x += kLanes)
      for (int p = 0; p < parts; p++) {
        const Vector<double> up = load(before + x + p * width), k = load_double(cells + x + p * width);
        left[p] = logarithm ? k + log_sum_exp(up, diagonal[p], left[p]) : k * (up + diagonal[p]) + k * left[p];
        diagonal[p] = up;
        store(alpha + x + p * width, left[p]);
      }
    before = alpha;
    alpha += alpha_stride;
    cells += stride;
  }
}
template <typename T>
void forward(const T* cells, int64_t stride, int64_t rows, int64_t columns, bool logarithm, bool first,
             const double* before, double* alpha, int64_t alpha_stride) {
  (logarithm ? forward_loop<T, true> : forward_loop<T, false>)(cells, stride, rows, columns, first, before, alpha,
                                                               alpha_stride);
}

template <typename T, bool gaussian, bool logarithm>
void backward_loop(T* cells, const T* u, int64_t stride, int64_t rows, int64_t columns, const double* alpha,
                   int64_t alpha_stride, double* below, const double* seeds, const double* coefficient, double* by_u) {
  constexpr int parts = kParts<double>, width = kWidth<double>;
  const Vector<double> zero = broadcast(logarithm ? kLogZero : 0.0);
  Vector<double> total[parts];
  for (int p = 0; p < parts; p++) total[p] = load(by_u + p * width);
  for (int64_t i = rows - 1; i >= 0; i--) {
    Vector<double> diagonal[parts], right[parts];
    for (int p = 0; p < parts; p++) diagonal[p] = right[p] = zero;
    const bool seeded = seeds && i == rows - 1;
    for (int64_t x = (columns - 1) * kLanes; x >= 0; x -= kLanes)
      for (int p = 0; p < parts; p++) {
        T* cell = cells + i * stride + x + p * width;
        const Vector<double> down = load(below + x + p * width), k = load_double(cell);
        const Vector<double> a = load(alpha + i * alpha_stride + x + p * width);
        Vector<double> beta, expected;
        if (logarithm) {
          beta = log_sum_exp(down, diagonal[p], right[p]);
          if (seeded) beta = larger(beta, load(seeds + x + p * width));  // a seed is the only start in its cell
          expected = exp_of<double>(smaller(a + beta, broadcast(0.0)));
          right[p] = larger(k + beta, zero);
        } else {
          Vector<double> before = down + diagonal[p];
          if (seeded) before += load(seeds + x + p * width);
          beta = before + right[p];
          expected = a * beta;
          right[p] = k * before + k * right[p];
        }
        diagonal[p] = down;
        store(below + x + p * width, right[p]);
        expected *= load(coefficient + p * width);
        if (gaussian) expected *= 1.0 + (logarithm ? exp_of<double>(k) : k);
        total[p] += expected * load_double(u + i * stride + x + p * width);
        store_double(cell, expected);
      }
  }
  for (int p = 0; p < parts; p++) store(by_u + p * width, total[p]);
}
template <typename T>
void backward(T* cells, const T* u, int64_t stride, int64_t rows, int64_t columns, bool gaussian, bool logarithm,
              const double* alpha, int64_t alpha_stride, double* below, const double* seeds, const double* coefficient,
              double* by_u) {
  auto* loop = gaussian ? (logarithm ? backward_loop<T, true, true> : backward_loop<T, true, false>)
                        : (logarithm ? backward_loop<T, false, true> : backward_loop<T, false, false>);
  loop(cells, u, stride, rows, columns, alpha, alpha_stride, below, seeds, coefficient, by_u);
}

template <typename T> T sums(const T* v, const T* mask, T* masked, int64_t columns, T* column_sums) {
  Vector<T> total = {};
  for (int64_t x = 0; x < columns * kLanes; x += kWidth<T>) {
    Vector<T> value = load(v + x);
    if (mask) {
      value *= load(mask + x);
      store(masked + x, value);
    }
    total += value;
    store(column_sums + x, load(column_sums + x) + value);
  }
  T sum = 0;
  for (int k = 0; k < kWidth<T>; k++) sum += total[k];
  return sum;
}

}  // namespace

template <typename T> LaneKernels<T> kernels() {
  return {scaled_distances<T>, local_kernel<T>, forward<T>, backward<T>, sums<T>};
}
template LaneKernels<float> kernels<float>();
template LaneKernels<double> kernels<double>();

}  // namespace UNIGD_ISA
}  // namespace unigd
