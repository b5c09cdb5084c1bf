// The dynamic maps in a device's memory, uploaded on first use (blockwise_cuda.cu). They live as long as the process.
#pragma once
#include <c10/core/Device.h>

#if defined(__CUDACC__)
#include <c10/cuda/CUDAException.h>

#include <algorithm>
#endif

#include "kernels/dynamic_map.h"

namespace stroma {
const DynamicMap<true>* signed_map_on(c10::Device device);
const DynamicMap<false>* unsigned_map_on(c10::Device device);

#if defined(__CUDACC__)
// A thread takes eight neighbours at a time, and a warp so a whole quantized block.
static_assert(kQuantBlock == 32 * 8);
constexpr int kThreads = 256;  // of a thread block

// As many thread blocks as the card holds at once take `threads` between them in turns.
inline int grid(int64_t threads) {
  int device = 0, processors = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t all = processors * int64_t{8};
  return static_cast<int>(std::min((threads + kThreads - 1) / kThreads, all));
}

template <typename T>
struct alignas(sizeof(T) < 2 ? 8 : 16) Eight {
  T at[8];
};

// `aligned`: the tensor begins at a multiple of 16 bytes; then whole eights go 16 bytes at once.
template <typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* __restrict__ from, int64_t i, int64_t n, bool aligned) {
  if (aligned && i + 8 <= n) return *reinterpret_cast<const Eight<T>*>(from + i);
  Eight<T> all{};
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k)
    if (i + k < n) all.at[k] = from[i + k];
  return all;
}
template <typename T>
__device__ __forceinline__ void store_eight(T* __restrict__ to, int64_t i, int64_t n, bool aligned,
                                            const Eight<T>& all) {
  if (aligned && i + 8 <= n) {
    *reinterpret_cast<Eight<T>*>(to + i) = all;
    return;
  }
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k)
    if (i + k < n) to[i + k] = all.at[k];
}

// Look-ups go to a thread block's own memory: the whole thread block calls it, and waits.
template <typename Map>
__device__ __forceinline__ void copy_map(const Map* __restrict__ from, Map& to) {
  const uint32_t* source = reinterpret_cast<const uint32_t*>(from);
  uint32_t* target = reinterpret_cast<uint32_t*>(&to);
  for (unsigned word = threadIdx.x; word < sizeof(Map) / 4; word += blockDim.x) target[word] = source[word];
  __syncthreads();
}

// A warp's block, eight elements (0 beyond the tensor's end) of each thread: their codes; writes the block's absmax.
// All of the warp have read the old one when one of them writes it, since each waits for the others' largest.
template <bool Signed, bool KeepSign>
__device__ __forceinline__ Eight<uint8_t> encode_eight(const DynamicMap<Signed>& map, const float (&x)[8],
                                                       float* absmax) {
  uint32_t most = 0;
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k) most = max(most, magnitude_bits(x[k]));
  most = __reduce_max_sync(0xffffffffu, most);
  const float inverse = inverse_absmax(bits_float(most));
  const bool vanishes = inverse == 0.0f && most < 0x7f800000u;
  if (threadIdx.x % 32 == 0) *absmax = vanishes ? 0.0f : bits_float(most);
  Eight<uint8_t> codes;
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k)
    codes.at[k] = vanishes ? 0 : static_cast<uint8_t>(nearest_code<Signed, KeepSign>(map.cell, x[k], inverse));
  return codes;
}
#endif
}  // namespace stroma
