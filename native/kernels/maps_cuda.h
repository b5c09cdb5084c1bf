// The dynamic maps as CUDA kernels search them, in a device's memory, uploaded on first use (blockwise_cuda.cu). They
// live as long as the process.
#pragma once
#include <c10/core/Device.h>

#if defined(__CUDACC__)
#include <c10/cuda/CUDAException.h>

#include <algorithm>
#include <type_traits>
#endif

#include "kernels/dynamic_map.h"
#include "kernels/rounding.h"

namespace stroma {
// A cell's entry is made so that its code is the top byte of entry + lifted, where lifted is the magnitude's bits times
// 2^kLift, of a value below zero times -2^kLift: what lies above the cell's beginning carries into the code, or borrows
// of it, from the boundary on. Cells below zero follow the others. What nearest_code() finds, with and without
// KeepSign.
template <bool Signed, bool KeepSign>
struct WarpMap {
  using Map = DynamicMap<Signed>;
  static constexpr int kLift = 24 - Map::kShift;

  float value[256];
  uint32_t entry[(Signed ? 2 : 1) * Map::kCells];

  static void make(WarpMap& to, const Map& from) {
    for (int code = 0; code < 256; ++code) to.value[code] = from.value[code];
    for (int below = 0; below < (Signed ? 2 : 1); ++below) {
      const auto code_at = [&](uint32_t magnitude) {
        return static_cast<uint32_t>(nearest_code<Signed, KeepSign>(
            from.cell, bits_float(magnitude | static_cast<uint32_t>(below) << 31), 1.0f));
      };
      for (int c = 0; c < Map::kCells; ++c) {
        const uint32_t begin = kFirstCell + (static_cast<uint32_t>(c) << Map::kShift), size = 1u << Map::kShift;
        const uint32_t first = code_at(begin);
        uint32_t next = 0;  // first place of the cell with another code; size: none
        for (uint32_t high = size; next < high;) {
          const uint32_t mid = next + (high - next) / 2;
          if (code_at(begin + mid) != first)
            high = mid;
          else
            next = mid + 1;
        }
        const uint32_t carry = below != 0 ? (next << kLift) - 1 : (size - next) << kLift;
        const uint32_t lifted = begin << kLift;
        to.entry[below * Map::kCells + c] = (first << 24) + carry + (below != 0 ? lifted : 0u - lifted);
      }
    }
  }
};
using MomentMap = WarpMap<true, true>;   // of the first moment, whose sign is kept
using SignedMap = WarpMap<true, false>;  // of any values
using UnsignedMap = WarpMap<false, false>;

const MomentMap* moment_map_on(c10::Device device);
const SignedMap* signed_map_on(c10::Device device);
const UnsignedMap* unsigned_map_on(c10::Device device);

#if defined(__CUDACC__)
// A thread takes eight neighbours at a time, and a warp so a whole quantized block.
static_assert(kQuantBlock == 32 * 8);
constexpr int kThreads = 512;  // of a thread block, which has maps of its own

// As many thread blocks as the card holds at once take `threads` between them in turns.
inline int grid(int64_t threads) {
  int device = 0, processors = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t all = processors * int64_t{4};
  return static_cast<int>(std::min((threads + kThreads - 1) / kThreads, all));
}

template <typename T>
struct alignas(sizeof(T) < 2 ? 8 : 16) Eight {
  T at[8];
};

// Whole: there are eight, from a multiple of 16 bytes on, and they go 16 bytes at once. Beyond the end: `beyond`.
template <bool Whole, typename T>
__device__ __forceinline__ Eight<T> load_eight(const T* __restrict__ from, int64_t i, int64_t n, T beyond = T(0)) {
  if constexpr (Whole) return *reinterpret_cast<const Eight<T>*>(from + i);
  Eight<T> all;
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k) all.at[k] = i + k < n ? from[i + k] : beyond;
  return all;
}
template <bool Whole, typename T>
__device__ __forceinline__ void store_eight(T* __restrict__ to, int64_t i, int64_t n, const Eight<T>& all) {
  if constexpr (Whole) {
    *reinterpret_cast<Eight<T>*>(to + i) = all;
    return;
  }
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k)
    if (i + k < n) to[i + k] = all.at[k];
}
// Calls for every block of 256 that is this warp's: work(std::bool_constant<Whole>, block, this thread's first
// element). `aligned`: all tensors begin at a multiple of 16 bytes.
template <typename Work>
__device__ __forceinline__ void each_block(int64_t n, bool aligned, const Work& work) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kThreads / 32);
  for (int64_t b = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; b * kQuantBlock < n;
       b += warps) {
    const int64_t i = b * kQuantBlock + threadIdx.x % 32 * 8;
    if (aligned && (b + 1) * kQuantBlock <= n)
      work(std::true_type(), b, i);
    else
      work(std::false_type(), b, i);
  }
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
__device__ __forceinline__ Eight<uint8_t> encode_eight(const WarpMap<Signed, KeepSign>& map, const float (&x)[8],
                                                       float* absmax) {
  using Warp = WarpMap<Signed, KeepSign>;
  using Map = typename Warp::Map;
  uint32_t most = 0;
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k) most = max(most, magnitude_bits(x[k]));
  most = __reduce_max_sync(0xffffffffu, most);
  const float inverse = inverse_absmax(bits_float(most));
  const bool vanishes = inverse == 0.0f && most < kInfinity;
  if (threadIdx.x % 32 == 0) *absmax = vanishes ? 0.0f : bits_float(most);
  Eight<uint8_t> codes{};
  if (vanishes) return codes;
  STROMA_UNROLL
  for (int k = 0; k < 8; ++k) {
    const float y = x[k] * inverse;
    const int32_t magnitude = static_cast<int32_t>(magnitude_bits(y));
    const int32_t in = min(max(magnitude, static_cast<int32_t>(kFirstCell)), static_cast<int32_t>(kOne));
    // A zero below zero is zero.
    const bool below = Signed && (KeepSign ? y < 0.0f : float_bits(y) >> 31 != 0);
    const int32_t c = (in >> Map::kShift) - static_cast<int32_t>(kFirstCell >> Map::kShift);
    const uint32_t lift = below ? 0u - (1u << Warp::kLift) : 1u << Warp::kLift;
    const uint32_t sum = map.entry[c + (below ? Map::kCells : 0)] + static_cast<uint32_t>(in) * lift;
    codes.at[k] = static_cast<uint8_t>(sum >> 24);
  }
  return codes;
}
#endif
}  // namespace stroma
