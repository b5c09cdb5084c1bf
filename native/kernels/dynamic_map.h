// The 8-bit dynamic map of block-wise quantized optimizer state (Dettmers et al., arXiv 2110.02861, section 1.3) and
// the search for the code nearest to a value.
//
// A block of 256 elements shares one float32 absmax; an element is map[code] * absmax. The signed map has a code for
// zero (127), one for 1.0 (255), and on each side 1 + 2 + ... + 64 values in decades from 1e-6; the unsigned map has
// zero (0), 1.0 (255) and 2 + 4 + ... + 128 values. Values are bitsandbytes' to the bit, which come from
// torch.linspace, whose last bit depends on the width of the processor's vectors: the map is therefore computed once at
// run time and never typed in.
//
// Search. The nearest code is the one with the least |x - map[code]| in float32 arithmetic, the lower one where two are
// equally near: what torch.argmin finds. A magnitude's upper bits name a cell, and a cell holds one boundary between
// two codes at most, so one look-up and one comparison decide. Between the bits compared stands the sign as the last
// bit, since a tie goes to the smaller magnitude above zero and to the larger one below.
#pragma once
#include "kernels/hd.h"

namespace stroma {

constexpr int64_t kQuantBlock = 256;

// Cells begin at 2^-23: every boundary lies above (the first, of the unsigned map, is 1.6e-7).
constexpr uint32_t kOne = 0x3f800000u, kFirstCell = 0x34000000u;

template <bool Signed>
struct DynamicMap {
  // Mantissa bits that are not part of the cell: the top decade is spaced by 0.9 / 64 (0.9 / 128 unsigned).
  static constexpr int kShift = Signed ? 17 : 16;
  static constexpr int kCells = static_cast<int>((kOne - kFirstCell) >> kShift) + 1;
  static constexpr uint32_t kNoBoundary = 2u << kShift;
  static constexpr int kZero = Signed ? 127 : 0;

  float value[256];       // by code, ascending
  uint32_t cell[kCells];  // code of the cell's lower end << 24 | where in the cell the next code begins
};

STROMA_HD uint32_t float_bits(float x) { return __builtin_bit_cast(uint32_t, x); }
STROMA_HD float bits_float(uint32_t x) { return __builtin_bit_cast(float, x); }
// Orders magnitudes, NaN above infinity: what a block's absmax is taken from, so that no NaN is lost.
STROMA_HD uint32_t magnitude_bits(float x) { return float_bits(x) & 0x7fffffffu; }

// 1 / absmax; 0 for a block of zeros or of values whose absmax has no inverse (below 2^-128), whose codes are all 0.
STROMA_HD float inverse_absmax(float absmax) {
  const float inverse = 1.0f / absmax;
  return float_bits(inverse) == 0x7f800000u ? 0.0f : inverse;
}

// Code of x * inverse. KeepSign: a value below zero never takes zero's code (the sign of the first moment survives).
template <bool Signed, bool KeepSign>
STROMA_HD int32_t nearest_code(const uint32_t* __restrict cell, float x, float inverse) {
  using Map = DynamicMap<Signed>;
  const uint32_t bits = float_bits(x * inverse);
  const int32_t magnitude = static_cast<int32_t>(bits & 0x7fffffffu);
  const int32_t low = magnitude > static_cast<int32_t>(kFirstCell) ? magnitude : static_cast<int32_t>(kFirstCell);
  const int32_t in = low < static_cast<int32_t>(kOne) ? low : static_cast<int32_t>(kOne);
  const uint32_t entry = cell[(in - static_cast<int32_t>(kFirstCell)) >> Map::kShift];
  const int32_t sign = Signed ? static_cast<int32_t>(bits >> 31) : 0;
  const int32_t rest = ((in << 1) & static_cast<int32_t>(Map::kNoBoundary - 1)) | sign;
  const int32_t code = static_cast<int32_t>(entry >> 24) + (rest >= static_cast<int32_t>(entry & 0xffffffu) ? 1 : 0);
  if constexpr (!Signed) return code;
  // Without branches, for vectors. Below zero the map ends one code earlier: it has no -1.0.
  const int32_t most = 128 - sign, least = KeepSign ? sign & (magnitude != 0 ? 1 : 0) : 0;
  const int32_t upper = code < most ? code : most, away = upper > least ? upper : least;
  return Map::kZero + (sign != 0 ? -away : away);
}

// The two maps of this process, computed on first use (blockwise_cpu.cc).
const DynamicMap<true>& signed_map();
const DynamicMap<false>& unsigned_map();

}  // namespace stroma
