// The dynamic maps in a device's memory, uploaded on first use (blockwise_cuda.cu). They live as long as the process.
#pragma once
#include <c10/core/Device.h>

#include "kernels/dynamic_map.h"

namespace stroma {
const DynamicMap<true>* signed_map_on(c10::Device device);
const DynamicMap<false>* unsigned_map_on(c10::Device device);

#if defined(__CUDACC__)
// A quantized block is a thread block of kQuantBlock threads. `x` is the thread's element (0 beyond the tensor's end);
// returns its code, and writes the block's absmax.
template <bool Signed, bool KeepSign>
__device__ __forceinline__ uint8_t encode_element(const DynamicMap<Signed>& map, float x, float* absmax,
                                                  uint32_t* shared_most) {
  uint32_t most = magnitude_bits(x);
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, most, lanes);
    most = other > most ? other : most;
  }
  __syncthreads();  // the words may still be read for the values before
  if (threadIdx.x % 32 == 0) shared_most[threadIdx.x / 32] = most;
  __syncthreads();
  for (int warp = 0; warp < kQuantBlock / 32; ++warp) most = shared_most[warp] > most ? shared_most[warp] : most;
  const float inverse = inverse_absmax(bits_float(most));
  const bool vanishes = inverse == 0.0f && most < 0x7f800000u;
  if (threadIdx.x == 0) *absmax = vanishes ? 0.0f : bits_float(most);
  return vanishes ? 0 : static_cast<uint8_t>(nearest_code<Signed, KeepSign>(map.cell, x, inverse));
}
#endif
}  // namespace stroma
