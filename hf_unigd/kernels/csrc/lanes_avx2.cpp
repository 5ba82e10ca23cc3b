#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define UNIGD_ISA avx2
#define UNIGD_VECTOR_BYTES 32
#include "lanes_impl.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
