// The kernels of rotary_cuda.cu.
#pragma once
#include "kernels/packs_cuda.h"
#include "kernels/rotary.h"

namespace stroma {

// A thread has a frequency, or some, and goes over every gridDim.x-th row of positions.
template <typename Wide, typename T>
__global__ void rotary_table_kernel(const int64_t* __restrict__ positions, T* __restrict__ table, const int64_t rows,
                                    const int64_t half, const RotaryFrequencies<Wide> frequencies) {
  for (int64_t i = threadIdx.x; i < half; i += blockDim.x) {
    const Wide frequency = frequencies.at(i);
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
      const Wide angle = static_cast<Wide>(positions[row]) * frequency;
      table[row * 2 * half + i] = static_cast<T>(cosine(angle));
      table[row * 2 * half + half + i] = static_cast<T>(sine(angle));
    }
  }
}

// Of x [B, N, T, H] and its result: elements from one batch row, head and token to the next.
struct RotateStrides {
  int64_t batch, head, token;
};

// A thread block turns all heads of one token, N elements of either half at once by each thread.
template <int N, typename Wide, typename T>
__global__ void rotate_kernel(const T* __restrict__ x, const T* __restrict__ table, T* __restrict__ out,
                              const int64_t tokens, const int heads, const int half, const RotateStrides strides,
                              const bool back) {
  const int64_t row = blockIdx.x, first = row / tokens * strides.batch + row % tokens * strides.token;
  const T* turns = table + row * 2 * half;
  const int packs = half / N;
  for (int j = threadIdx.x; j < heads * packs; j += blockDim.x) {
    const int head = j / packs, i = (j - head * packs) * N;
    const int64_t at = first + head * strides.head + i;
    Pack<T, N> low = load_pack<N>(x + at), high = load_pack<N>(x + at + half);
    const Pack<T, N> cos = load_pack<N>(turns + i), sin = load_pack<N>(turns + half + i);
    STROMA_UNROLL
    for (int k = 0; k < N; ++k) turn<Wide>(low.at[k], high.at[k], cos.at[k], sin.at[k], back);
    store_pack<N>(out + at, low);
    store_pack<N>(out + at + half, high);
  }
}

}  // namespace stroma
