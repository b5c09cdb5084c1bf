// The kernels of adamw_cuda.cu.
#pragma once
#include "kernels/adamw.h"
#include "kernels/checks.h"
#include "kernels/maps_cuda.h"
#include "kernels/rounding.h"

namespace stroma {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(double x) { return static_cast<float>(x); }
__device__ __forceinline__ float widen(uint16_t bfloat16) { return bfloat16_to_float(bfloat16); }

// Where float32 weights are kept, and how.
struct WeightPlace {
  void* param;
  void* master;
  PhiloxKey key;
  int64_t first;
};

template <Weight Kind, bool Whole>
__device__ __forceinline__ void load_weights(const WeightPlace& w, int64_t i, int64_t n, float (&p)[8]) {
  if constexpr (Kind == Weight::plain || Kind == Weight::master) {
    const auto* kept = static_cast<const float*>(Kind == Weight::plain ? w.param : w.master);
    const Eight<float> all = load_eight<Whole>(kept, i, n);
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) p[k] = all.at[k];
  } else {
    const Eight<uint16_t> high = load_eight<Whole>(static_cast<const uint16_t*>(w.param), i, n);
    Eight<int16_t> low{};
    if constexpr (Kind == Weight::split) low = load_eight<Whole>(static_cast<const int16_t*>(w.master), i, n);
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k)
      p[k] = Kind == Weight::split ? join16(high.at[k], low.at[k]) : bfloat16_to_float(high.at[k]);
  }
}

template <Weight Kind, bool Whole>
__device__ __forceinline__ void store_weights(const WeightPlace& w, int64_t i, int64_t n, const float (&p)[8]) {
  if constexpr (Kind == Weight::plain || Kind == Weight::master) {
    Eight<float> all;
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) all.at[k] = p[k];
    store_eight<Whole>(static_cast<float*>(Kind == Weight::plain ? w.param : w.master), i, n, all);
  }
  if constexpr (Kind == Weight::plain) return;
  Eight<uint16_t> high;
  if constexpr (Kind == Weight::master) {
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) high.at[k] = nearest_bfloat16(p[k]);
  }
  if constexpr (Kind == Weight::split) {
    Eight<int16_t> low;
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) {
      const Split16 halves = split16(p[k]);
      high.at[k] = halves.high;
      low.at[k] = halves.low;
    }
    store_eight<Whole>(static_cast<int16_t*>(w.master), i, n, low);
  }
  if constexpr (Kind == Weight::stochastic) {
    const Uint4 draws = eight_draws(w.key, w.first + i);
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) high.at[k] = stochastic_bfloat16(p[k], rounding_draw(draws, k));
  }
  store_eight<Whole>(static_cast<uint16_t*>(w.param), i, n, high);
}

template <bool Whole, typename G>
__device__ __forceinline__ void load_gradient(const G* __restrict__ grad, int64_t i, int64_t n, float (&g)[8]) {
  const Eight<G> all = load_eight<Whole>(grad, i, n);
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k) g[k] = widen(all.at[k]);
}

// The correctly rounded root and quotient, as nvcc makes them of __fsqrt_rn and __fdiv_rn where operands are neither
// tiny nor huge, but without a branch behind each: eight of them are under way at once. `plain`: stays true while they
// are so.
__device__ __forceinline__ float plain_root(float x, bool& plain) {
  plain &= float_bits(x) - 0x0d000000u <= 0x727fffffu;  // from 2^-101 to the largest
#if defined(__CUDA_ARCH__)
  float r;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  const float s = x * r;
  return fused_multiply_add(fused_multiply_add(-s, s, x), r * 0.5f, s);
#else
  return square_root(x);
#endif
}
// Markstein, "Computation of elementary functions on the IBM RISC System/6000 processor" (1990).
__device__ __forceinline__ float plain_quotient(float a, float b, bool& plain) {
  // |a| from 2^-80 to 2^60 and b from 2^-60 to 2^20: no step leaves the normal numbers.
  plain &= magnitude_bits(a) - 0x17800000u < 0x5d800000u - 0x17800000u && float_bits(b) - 0x21800000u < 0x28000000u;
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
  r = fused_multiply_add(r, fused_multiply_add(-b, r, 1.0f), r);
  const float q = a * r;
  return fused_multiply_add(r, fused_multiply_add(-b, q, a), q);
#else
  return a / b;
#endif
}

// adamw_quantized() of eight.
__device__ __forceinline__ void adamw_quantized_eight(const AdamWStep<float>& s, const float (&g)[8], float (&p)[8],
                                                      float (&m)[8], float (&v)[8]) {
  bool plain = true;
  float updated[8];
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k) {
    adamw_moments(s, g[k], m[k], v[k]);
    const float denominator = fused_multiply_add(plain_root(v[k], plain), s.inverse_sqrt_correction2, s.epsilon);
    updated[k] = p[k] * s.decay + plain_quotient(s.negative_step_size * m[k], denominator, plain);
  }
  if (plain) {
    // A root that is plain is of a finite moment.
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) p[k] = updated[k];
    return;
  }
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k) adamw_quantized_weight(s, p[k], m[k], v[k]);
}

// A parameter of double, with moments of double.
template <typename G>
__global__ void adamw_wide_kernel(const AdamWStep<double> s, const G* __restrict__ grad, double* __restrict__ param,
                                  double* __restrict__ m, double* __restrict__ v, const int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    double m_i = m[i], v_i = v[i], g;
    if constexpr (std::is_same_v<G, double>)
      g = grad[i];
    else
      g = static_cast<double>(widen(grad[i]));
    const double root = square_root(adamw_moments(s, g, m_i, v_i));
    param[i] = adamw_parameter(s, param[i], m_i, root);
    m[i] = m_i;
    v[i] = v_i;
  }
}

template <Weight Kind, typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(const AdamWStep<float> s, const G* __restrict__ grad, const WeightPlace weight, float* __restrict__ m,
                 float* __restrict__ v, const int64_t n, const bool aligned) {
  each_block(n, aligned, [&](auto whole, int64_t, int64_t i) {
    constexpr bool Whole = decltype(whole)::value;
    float g[8], p[8];
    load_gradient<Whole>(grad, i, n, g);
    load_weights<Kind, Whole>(weight, i, n, p);
    Eight<float> m_i = load_eight<Whole>(m, i, n), v_i = load_eight<Whole>(v, i, n);
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) {
      const float root = square_root(adamw_moments(s, g[k], m_i.at[k], v_i.at[k]));
      p[k] = adamw_parameter(s, p[k], m_i.at[k], root);
    }
    store_weights<Kind, Whole>(weight, i, n, p);
    store_eight<Whole>(m, i, n, m_i);
    store_eight<Whole>(v, i, n, v_i);
  });
}

template <Weight Kind, typename G>
__global__ void __launch_bounds__(kThreads, 2)
    adamw_quantized_kernel(const AdamWStep<float> s, const G* __restrict__ grad, const WeightPlace weight,
                           const MomentMap* __restrict__ moment_map, const UnsignedMap* __restrict__ unsigned_map,
                           uint8_t* __restrict__ code1, uint8_t* __restrict__ code2, float* __restrict__ absmax1,
                           float* __restrict__ absmax2, const int64_t n, const bool aligned) {
  __shared__ MomentMap map1;
  __shared__ UnsignedMap map2;
  copy_map(moment_map, map1);
  copy_map(unsigned_map, map2);
  each_block(n, aligned, [&](auto whole, int64_t b, int64_t i) {
    constexpr bool Whole = decltype(whole)::value;
    float g[8], p[8], m[8], v[8];
    load_gradient<Whole>(grad, i, n, g);
    load_weights<Kind, Whole>(weight, i, n, p);
    // Beyond the end: zeros, which no block's absmax is taken from.
    const auto c1 = load_eight<Whole>(code1, i, n, static_cast<uint8_t>(MomentMap::Map::kZero)),
               c2 = load_eight<Whole>(code2, i, n, static_cast<uint8_t>(UnsignedMap::Map::kZero));
    const float scale1 = absmax1[b], scale2 = absmax2[b];
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) {
      m[k] = map1.value[c1.at[k]] * scale1;
      v[k] = map2.value[c2.at[k]] * scale2;
    }
    adamw_quantized_eight(s, g, p, m, v);
    store_weights<Kind, Whole>(weight, i, n, p);
    store_eight<Whole>(code1, i, n, encode_eight(map1, m, absmax1 + b));
    store_eight<Whole>(code2, i, n, encode_eight(map2, v, absmax2 + b));
  });
}

}  // namespace stroma
