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

// The search of dynamic_map.h as one look-up and one addition, for a CPU without fast gathers. The upper 15 bits of a
// value below its sign (unsigned map) or with it (signed) name a cell; entry[cell] + (bits << kLift) has the code in
// its upper byte, and 255 minus the code for a negative value, whose codes fall as magnitudes rise: what stands below
// is how far the value lies from where the next code begins, and carries. Made from nearest_code, so equal to it by
// making.
template <bool Signed>
struct CodeTable {
  static constexpr int kShift = DynamicMap<Signed>::kShift, kLift = 24 - kShift;
  uint32_t entry[1 << 15];
};

// The three of this process, computed on first use (blockwise_cpu.cc).
template <bool Signed, bool KeepSign>
const CodeTable<Signed>& code_table();

// Inlined, all, to be compiled for their caller's instruction set. `value` and `entry` are a map's and a table's; as
// parameters, since only so does restrict hold, and look-ups beside stored bytes are vectorised with it alone.
#define STROMA_INLINE inline __attribute__((always_inline))

STROMA_INLINE void decode_block(const float* __restrict value, const uint8_t* __restrict code, float absmax,
                                float* __restrict out) {
  for (int32_t i = 0; i < kQuantBlock; ++i) out[i] = value[code[i]] * absmax;
}

// The largest magnitude's bits.
STROMA_INLINE int32_t most_of_block(const float* __restrict x) {
  int32_t most = 0;
  for (int32_t i = 0; i < kQuantBlock; ++i) most = std::max(most, static_cast<int32_t>(magnitude_bits(x[i])));
  return most;
}

template <bool Signed>
STROMA_INLINE void encode_block(const uint32_t* __restrict entry, const float* __restrict x, int32_t most,
                                float* __restrict absmax, uint8_t* __restrict code) {
  using Table = CodeTable<Signed>;
  const float inverse = inverse_absmax(bits_float(static_cast<uint32_t>(most)));
  const bool vanishes = inverse == 0.0f && most < 0x7f800000;
  *absmax = vanishes ? 0.0f : bits_float(static_cast<uint32_t>(most));
  if (vanishes) {
    std::fill_n(code, kQuantBlock, uint8_t{0});
    return;
  }
  // Through memory: a scalar load takes an index from there in one instruction, from a vector in two.
  alignas(64) uint32_t bits[kQuantBlock], cell[kQuantBlock];
  for (int32_t i = 0; i < kQuantBlock; ++i) {
    bits[i] = float_bits(x[i] * inverse);
    cell[i] = (Signed ? bits[i] : bits[i] & 0x7fffffffu) >> Table::kShift;
  }
  for (int32_t i = 0; i < kQuantBlock; ++i) {
    const uint32_t sum = entry[cell[i]] + (bits[i] << Table::kLift);
    const uint32_t negative = Signed ? static_cast<uint32_t>(static_cast<int32_t>(bits[i]) >> 31) : 0u;
    code[i] = static_cast<uint8_t>((sum ^ negative) >> 24);
  }
}

}  // namespace stroma
