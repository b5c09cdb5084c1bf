// Pieces of tiles on the CPU: flat pointers, no aliasing, on the calling thread. Blocks are whole (256 elements), since
// loops of a constant length vectorise best; who has a shorter last block pads it with zeros.
#pragma once
#include <c10/util/BFloat16.h>

#include <algorithm>

#include "kernels/dynamic_map.h"

namespace stroma {

// Rounds to nearest where To is the narrower one.
void convert(const c10::BFloat16* from, float* to, int64_t n);
void convert(const c10::BFloat16* from, double* to, int64_t n);
void convert(const double* from, float* to, int64_t n);
void convert(const float* from, double* to, int64_t n);
void convert(const float* from, c10::BFloat16* to, int64_t n);

// The first n < 256 elements of a block, and `rest` behind them.
template <typename T>
struct Padded {
  alignas(64) T data[kQuantBlock];
  Padded(const T* from, int64_t n, T rest = 0) { std::fill(std::copy_n(from, n, data), data + kQuantBlock, rest); }
};

// Inlined, both, to be compiled for their caller's instruction set. `value` and `cell` are a map's; as parameters,
// since only so does restrict hold, and look-ups beside stored bytes are vectorised with it alone.
inline __attribute__((always_inline)) void decode_block(const float* __restrict value, const uint8_t* __restrict code,
                                                        float absmax, float* __restrict out) {
  for (int32_t i = 0; i < kQuantBlock; ++i) out[i] = value[code[i]] * absmax;
}
template <bool Signed, bool KeepSign>
inline __attribute__((always_inline)) void encode_block(const uint32_t* __restrict cell, const float* __restrict x,
                                                        float* __restrict absmax, uint8_t* __restrict code) {
  int32_t most = 0;
  for (int32_t i = 0; i < kQuantBlock; ++i) most = std::max(most, static_cast<int32_t>(magnitude_bits(x[i])));
  const float inverse = inverse_absmax(bits_float(static_cast<uint32_t>(most)));
  const bool vanishes = inverse == 0.0f && most < 0x7f800000;
  *absmax = vanishes ? 0.0f : bits_float(static_cast<uint32_t>(most));
  if (vanishes) {
    std::fill_n(code, kQuantBlock, uint8_t{0});
    return;
  }
  for (int32_t i = 0; i < kQuantBlock; ++i)
    code[i] = static_cast<uint8_t>(nearest_code<Signed, KeepSign>(cell, x[i], inverse));
}

}  // namespace stroma
