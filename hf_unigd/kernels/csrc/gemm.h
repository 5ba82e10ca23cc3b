// C = A B or C += A B for row-major blocks, called from inside a thread.
#pragma once
#include <ATen/ATen.h>
#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <vector>

namespace unigd {

// Whether oneDNN's small-block products have AVX-512 code for float. They run at twice MKL's rate on AMD and at the same
// rate on Intel.
inline bool has_block_products() {
#if defined(CPUBLAS_BRGEMM_F32F32F32) && defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

#ifdef CPUBLAS_BRGEMM_F32F32F32
// The largest of 512, 256, ... 8 that fits, or the remainder. oneDNN compiles code for each shape, so there are few.
inline int64_t block_of(int64_t left, int64_t largest) {
  int64_t block = largest;
  while (block > left && block > 8) block /= 2;
  return std::min(block, left);
}

template <typename In>
void block_gemm(int64_t m, int64_t n, int64_t k, const In* a, int64_t lda, const In* b, int64_t ldb, float* c,
                int64_t ldc, bool accumulate) {
  constexpr int64_t rows_of_b = sizeof(In) == 2 ? 2 : 1;  // 16-bit B stores two consecutive k side by side (VNNI)
  for (int64_t j = 0, width; j < n; j += width) {
    width = std::min<int64_t>(64, n - j);
    for (int64_t i = 0, height; i < m; i += height) {
      height = block_of(m - i, 32);
      for (int64_t p = 0, depth; p < k; p += depth) {
        depth = block_of(k - p, 512);
        at::native::cpublas::brgemm(height, width, depth, lda, ldb, ldc, accumulate || p > 0, a + i * lda + p,
                                    b + p * ldb + j * rows_of_b, c + i * ldc + j, sizeof(In) == 2);
      }
    }
  }
}
#endif

// Whether this processor multiplies bfloat16 (AVX-512 BF16 or AMX). This is tried, because oneDNN throws if it cannot.
inline bool has_bfloat16_products() {
#ifdef CPUBLAS_BRGEMM_BF16BF16F32
  static const bool works = [] {
    if (!has_block_products()) return false;
    const std::vector<c10::BFloat16> ones(256, c10::BFloat16(1.f));
    std::vector<float> product(256);
    try {
      block_gemm<c10::BFloat16>(16, 16, 16, ones.data(), 16, ones.data(), 16, product.data(), 16, false);
    } catch (const c10::Error&) {
      return false;
    }
    at::native::cpublas::brgemm_release(true);
    return product[0] == 16.f && product[255] == 16.f;
  }();
  return works;
#else
  return false;
#endif
}

template <typename T>
void gemm(bool blocks, int64_t m, int64_t n, int64_t k, const T* a, int64_t lda, const T* b, int64_t ldb, T* c,
          int64_t ldc, bool accumulate) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if constexpr (std::is_same_v<T, float>)
    if (blocks) return block_gemm(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
#endif
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>::value);
  auto matrix = [&](const T* p, int64_t rows, int64_t columns, int64_t stride) {
    return at::from_blob(const_cast<T*>(p), {rows, columns}, {stride, 1}, options);
  };
  at::Tensor out = matrix(c, m, n, ldc);
  if (accumulate)
    at::addmm_out(out, out, matrix(a, m, k, lda), matrix(b, k, n, ldb));
  else
    at::mm_out(out, matrix(a, m, k, lda), matrix(b, k, n, ldb));
}

}  // namespace unigd
