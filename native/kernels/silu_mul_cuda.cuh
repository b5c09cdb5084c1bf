// The kernels of silu_mul_cuda.cu: N elements a thread, over all of them by the whole grid.
#pragma once
#include "kernels/packs_cuda.h"
#include "kernels/silu_mul.h"

namespace stroma {

template <int N, typename Wide, typename T>
__global__ void silu_mul_kernel(const T* __restrict__ gate, const T* __restrict__ up, T* __restrict__ out,
                                const int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < n; i += stride) {
    Pack<T, N> y = load_pack<N>(gate + i);
    const Pack<T, N> u = load_pack<N>(up + i);
    STROMA_UNROLL
    for (int k = 0; k < N; ++k) y.at[k] = silu_mul<Wide>(y.at[k], u.at[k]);
    store_pack<N>(out + i, y);
  }
}

template <int N, typename Wide, typename T>
__global__ void silu_mul_backward_kernel(const T* __restrict__ dy, const T* __restrict__ gate, const T* __restrict__ up,
                                         T* __restrict__ dgate, T* __restrict__ dup, const int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * N;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * N; i < n; i += stride) {
    const Pack<T, N> d = load_pack<N>(dy + i), g = load_pack<N>(gate + i), u = load_pack<N>(up + i);
    Pack<T, N> dg, du;
    STROMA_UNROLL
    for (int k = 0; k < N; ++k) silu_mul_gradients<Wide>(d.at[k], g.at[k], u.at[k], dg.at[k], du.at[k]);
    store_pack<N>(dgate + i, dg);
    store_pack<N>(dup + i, du);
  }
}

}  // namespace stroma
