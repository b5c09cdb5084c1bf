// One definition of the arithmetic for the CPU and CUDA twins of every kernel.
//
// Built with -ffp-contract=off (nvcc: --fmad=false): a fused multiply-add happens only where it is written, so that
// both twins round alike and stay equal to the ATen kernels whose place they take.
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define STROMA_HD __host__ __device__ __forceinline__
#else
#define STROMA_HD inline __attribute__((always_inline))
#endif

// Before a loop of few and constant rounds: unrolled, so that the loop around it can be vectorised.
#if defined(__CUDA_ARCH__) || defined(__clang__)
#define STROMA_UNROLL _Pragma("unroll")
#else
#define STROMA_UNROLL _Pragma("GCC unroll 16")
#endif

namespace stroma {
STROMA_HD float fused_multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}
STROMA_HD double fused_multiply_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}
STROMA_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
STROMA_HD double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}
}  // namespace stroma
