// The kernels of rms_norm_cuda.cu. Sums go in an order that the sizes alone decide: no atomics, and no matter what
// card.
#pragma once
#include "kernels/packs_cuda.h"
#include "kernels/rms_norm.h"

namespace stroma {

// Of a thread block.
constexpr int kNormThreads = 256;

// Over the Group neighbouring threads (a warp, or the block) that share a row; all of them get it.
template <int Group, typename Wide>
__device__ __forceinline__ Wide sum_of_row(Wide x) {
  static_assert(Group == 32 || Group == kNormThreads);
  STROMA_UNROLL
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  if constexpr (Group == 32) {
    return x;
  } else {
    __shared__ Wide warps[kNormThreads / 32];
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
    __syncthreads();
    x = warps[0];
    STROMA_UNROLL
    for (int w = 1; w < kNormThreads / 32; ++w) x += warps[w];
    return x;
  }
}

template <int Group>
struct NormRow {
  int64_t row = static_cast<int64_t>(blockIdx.x) * (kNormThreads / Group) + threadIdx.x / Group;
  int lane = threadIdx.x % Group;
};

template <int N, int Group, typename Wide, typename T>
__global__ void rms_norm_kernel(const T* __restrict__ x, const T* __restrict__ weight, T* __restrict__ y,
                                Wide* __restrict__ r, const int64_t rows, const int64_t width, const Wide eps) {
  const auto [row, lane] = NormRow<Group>{};
  const int64_t begin = row < rows ? lane * N : width;
  x += row * width;
  Wide sum = 0;
  for (int64_t c = begin; c < width; c += Group * N) {
    const Pack<T, N> v = load_pack<N>(x + c);
    STROMA_UNROLL
    for (int k = 0; k < N; ++k) sum += static_cast<Wide>(v.at[k]) * static_cast<Wide>(v.at[k]);
  }
  const Wide root = reciprocal_root(sum_of_row<Group>(sum), width, eps);
  if (row < rows && lane == 0) r[row] = root;
  y += row * width;
  for (int64_t c = begin; c < width; c += Group * N) {
    Pack<T, N> v = load_pack<N>(x + c);
    const Pack<T, N> w = load_pack<N>(weight + c);
    STROMA_UNROLL
    for (int k = 0; k < N; ++k) v.at[k] = product<Wide>(w.at[k], normed(v.at[k], root));
    store_pack<N>(y + c, v);
  }
}

template <int N, int Group, typename Wide, typename T>
__global__ void rms_norm_input_kernel(const T* __restrict__ dy, const T* __restrict__ x, const T* __restrict__ weight,
                                      const Wide* __restrict__ r, T* __restrict__ dx, const int64_t rows,
                                      const int64_t width) {
  const auto [row, lane] = NormRow<Group>{};
  const int64_t begin = row < rows ? lane * N : width;
  x += row * width;
  dy += row * width;
  Wide sum = 0;
  for (int64_t c = begin; c < width; c += Group * N) {
    const Pack<T, N> d = load_pack<N>(dy + c), w = load_pack<N>(weight + c), v = load_pack<N>(x + c);
    STROMA_UNROLL
    for (int k = 0; k < N; ++k) sum += static_cast<Wide>(product<Wide>(d.at[k], w.at[k])) * static_cast<Wide>(v.at[k]);
  }
  const Wide root = row < rows ? r[row] : Wide(0);
  const Wide dmean = mean_gradient(sum_of_row<Group>(sum), root, width);
  dx += row * width;
  for (int64_t c = begin; c < width; c += Group * N) {
    const Pack<T, N> d = load_pack<N>(dy + c), w = load_pack<N>(weight + c);
    Pack<T, N> v = load_pack<N>(x + c);
    STROMA_UNROLL
    for (int k = 0; k < N; ++k) v.at[k] = input_gradient(d.at[k], w.at[k], v.at[k], root, dmean);
    store_pack<N>(dx + c, v);
  }
}

// Sums over rows. A thread block has 32 N columns and a chunk of rows; warp w adds rows w, w + 8, ... of it.
constexpr int kSumWarps = kNormThreads / 32;

// Of all warps, in their order: calls write(column, sum) for each column that there is.
template <int N, typename Wide, typename Write>
__device__ __forceinline__ void sum_of_warps(const Wide (&mine)[N], int64_t width, const Write& write) {
  __shared__ Wide sums[kSumWarps][32 * N];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  STROMA_UNROLL
  for (int k = 0; k < N; ++k) sums[warp][lane * N + k] = mine[k];
  __syncthreads();
  for (int j = threadIdx.x; j < 32 * N; j += kNormThreads) {
    const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 * N + j;
    if (column >= width) continue;
    Wide sum = sums[0][j];
    STROMA_UNROLL
    for (int w = 1; w < kSumWarps; ++w) sum += sums[w][j];
    write(column, sum);
  }
}

// partial [chunks, width]: each chunk's sum of dy normed(x); blockIdx.y is the chunk.
template <int N, typename Wide, typename T>
__global__ void rms_norm_partial_kernel(const T* __restrict__ dy, const T* __restrict__ x, const Wide* __restrict__ r,
                                        Wide* __restrict__ partial, const int64_t rows, const int64_t width,
                                        const int64_t chunk) {
  const int64_t c = (static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32) * N;
  const int64_t begin = blockIdx.y * chunk, end = begin + chunk < rows ? begin + chunk : rows;
  Wide mine[N] = {};
  if (c < width)
    for (int64_t row = begin + threadIdx.x / 32; row < end; row += kSumWarps) {
      const Pack<T, N> d = load_pack<N>(dy + row * width + c), v = load_pack<N>(x + row * width + c);
      STROMA_UNROLL
      for (int k = 0; k < N; ++k) mine[k] += static_cast<Wide>(product<Wide>(d.at[k], normed(v.at[k], r[row])));
    }
  sum_of_warps(mine, width, [&](int64_t column, Wide sum) { partial[blockIdx.y * width + column] = sum; });
}

template <typename Wide, typename T>
__global__ void rms_norm_weight_kernel(const Wide* __restrict__ partial, T* __restrict__ dweight, const int64_t chunks,
                                       const int64_t width) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + threadIdx.x % 32;
  Wide mine[1] = {};
  if (c < width)
    for (int64_t i = threadIdx.x / 32; i < chunks; i += kSumWarps) mine[0] += partial[i * width + c];
  sum_of_warps(mine, width, [&](int64_t column, Wide sum) { dweight[column] = static_cast<T>(sum); });
}

}  // namespace stroma
