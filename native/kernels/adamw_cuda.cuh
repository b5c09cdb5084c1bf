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
  bool aligned;
};

template <Weight Kind>
__device__ __forceinline__ void load_weights(const WeightPlace& w, int64_t i, int64_t n, float (&p)[8]) {
  if constexpr (Kind == Weight::plain || Kind == Weight::master) {
    const auto* kept = static_cast<const float*>(Kind == Weight::plain ? w.param : w.master);
    const Eight<float> all = load_eight(kept, i, n, w.aligned);
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) p[k] = all.at[k];
  } else {
    const Eight<uint16_t> high = load_eight(static_cast<const uint16_t*>(w.param), i, n, w.aligned);
    Eight<int16_t> low{};
    if constexpr (Kind == Weight::split) low = load_eight(static_cast<const int16_t*>(w.master), i, n, w.aligned);
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k)
      p[k] = Kind == Weight::split ? join16(high.at[k], low.at[k]) : bfloat16_to_float(high.at[k]);
  }
}

template <Weight Kind>
__device__ __forceinline__ void store_weights(const WeightPlace& w, int64_t i, int64_t n, const float (&p)[8]) {
  if constexpr (Kind == Weight::plain || Kind == Weight::master) {
    Eight<float> all;
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) all.at[k] = p[k];
    store_eight(static_cast<float*>(Kind == Weight::plain ? w.param : w.master), i, n, w.aligned, all);
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
    store_eight(static_cast<int16_t*>(w.master), i, n, w.aligned, low);
  }
  if constexpr (Kind == Weight::stochastic) {
    const Uint4 draws = eight_draws(w.key, w.first + i);
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) high.at[k] = stochastic_bfloat16(p[k], rounding_draw(draws, k));
  }
  store_eight(static_cast<uint16_t*>(w.param), i, n, w.aligned, high);
}

template <typename G>
__device__ __forceinline__ void load_gradient(const G* grad, int64_t i, int64_t n, bool aligned, float (&g)[8]) {
  const Eight<G> all = load_eight(grad, i, n, aligned);
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k) g[k] = widen(all.at[k]);
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
                 float* __restrict__ v, const int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * 8;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 8; i < n; i += stride) {
    float g[8], p[8];
    load_gradient(grad, i, n, weight.aligned, g);
    load_weights<Kind>(weight, i, n, p);
    Eight<float> m_i = load_eight(m, i, n, weight.aligned), v_i = load_eight(v, i, n, weight.aligned);
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) {
      const float root = square_root(adamw_moments(s, g[k], m_i.at[k], v_i.at[k]));
      p[k] = adamw_parameter(s, p[k], m_i.at[k], root);
    }
    store_weights<Kind>(weight, i, n, p);
    store_eight(m, i, n, weight.aligned, m_i);
    store_eight(v, i, n, weight.aligned, v_i);
  }
}

template <Weight Kind, typename G>
__global__ void __launch_bounds__(kThreads, 4)
    adamw_quantized_kernel(const AdamWStep<float> s, const G* __restrict__ grad, const WeightPlace weight,
                           const DynamicMap<true>* __restrict__ signed_map,
                           const DynamicMap<false>* __restrict__ unsigned_map, uint8_t* __restrict__ code1,
                           uint8_t* __restrict__ code2, float* __restrict__ absmax1, float* __restrict__ absmax2,
                           const int64_t n) {
  __shared__ DynamicMap<true> map1;
  __shared__ DynamicMap<false> map2;
  copy_map(signed_map, map1);
  copy_map(unsigned_map, map2);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; b * kQuantBlock < n;
       b += warps) {
    const int64_t i = b * kQuantBlock + threadIdx.x % 32 * 8;
    float g[8], p[8], m[8], v[8];
    load_gradient(grad, i, n, weight.aligned, g);
    load_weights<Kind>(weight, i, n, p);
    const Eight<uint8_t> c1 = load_eight(code1, i, n, weight.aligned), c2 = load_eight(code2, i, n, weight.aligned);
    const float scale1 = absmax1[b], scale2 = absmax2[b];
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) {
      // Beyond the end: nothing, which no block's absmax is taken from.
      m[k] = i + k < n ? map1.value[c1.at[k]] * scale1 : 0.0f;
      v[k] = i + k < n ? map2.value[c2.at[k]] * scale2 : 0.0f;
      if (s.from_moment())
        adamw_quantized<true>(s, g[k], p[k], m[k], v[k]);
      else
        adamw_quantized<false>(s, g[k], p[k], m[k], v[k]);
    }
    store_weights<Kind>(weight, i, n, p);
    store_eight(code1, i, n, weight.aligned, encode_eight<true, true>(map1, m, absmax1 + b));
    store_eight(code2, i, n, weight.aligned, encode_eight<false, false>(map2, v, absmax2 + b));
  }
}

}  // namespace stroma
