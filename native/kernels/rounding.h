// How a float32 weight is kept in bfloat16: rounded to nearest, split into two halves, or rounded stochastically.
//
// NaN and infinity survive each of them. A finite value beyond bfloat16's largest becomes infinity, as in PyTorch.
#pragma once
#include "kernels/dynamic_map.h"
#include "kernels/philox.h"

namespace stroma {

constexpr uint32_t kInfinity = 0x7f800000u;

STROMA_HD float bfloat16_to_float(uint16_t b) { return bits_float(static_cast<uint32_t>(b) << 16); }

STROMA_HD uint32_t quiet_nan(uint32_t bits) { return (bits >> 16) | 0x40u; }

// Round to nearest, ties to even: PyTorch's conversion.
STROMA_HD uint16_t nearest_bfloat16(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > kInfinity ? 0x7fc0u : rounded);
}

// Split: `high` is x rounded to nearest, ties away from zero (bfloat16), and `low` the lower 16 bits of x as a signed
// number, which corrects `high` where it was rounded up: bits(x) = (high << 16) + low, exactly. A tie to even would
// need +32,768. A NaN becomes the quiet NaN of its sign and payload, with low 0.
struct Split16 {
  uint16_t high;
  int16_t low;
};
STROMA_HD Split16 split16(float x) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > kInfinity;
  return {static_cast<uint16_t>(nan ? quiet_nan(bits) : (bits + 0x8000u) >> 16),
          static_cast<int16_t>(nan ? 0u : bits & 0xffffu)};
}
STROMA_HD float join16(uint16_t high, int16_t low) {
  return bits_float((static_cast<uint32_t>(high) << 16) + static_cast<uint32_t>(static_cast<int32_t>(low)));
}

// Up with probability (lower 16 bits) / 2^16, else down: the mean is x exactly. `draw` is uniform in 0 .. 65,535.
STROMA_HD uint16_t stochastic_bfloat16(float x, uint32_t draw) {
  const uint32_t bits = float_bits(x);
  const bool nan = (bits & 0x7fffffffu) > kInfinity;
  return static_cast<uint16_t>(nan ? quiet_nan(bits) : (bits + draw) >> 16);  // infinity: lower bits 0, stays
}

// Rounding's draws: element i of tensor `tensor` takes 16 bits of philox(key, i / 8). The last word keeps these keys
// apart from dropout's, whose sites count from zero.
inline PhiloxKey rounding_key(int64_t seed, int64_t step, int64_t tensor) {
  return philox_key(seed, step, tensor, 0, -1);
}
STROMA_HD uint32_t rounding_draw(const Uint4& words, int64_t element) {
  const uint32_t word = (element & 4) ? ((element & 2) ? words.w : words.z) : ((element & 2) ? words.y : words.x);
  return (word >> ((element & 1) * 16)) & 0xffffu;
}

// The draws of `element` and the seven after it, as rounding_draw() takes them of 0 to 7. One call of Philox where
// element is a multiple of eight, else two, and no array that is indexed by what is not known when it is compiled.
STROMA_HD Uint4 eight_draws(PhiloxKey key, int64_t element) {
  const uint64_t group = static_cast<uint64_t>(element) / 8;
  const Uint4 a = philox4x32(key, group);
  const uint32_t shift = static_cast<uint32_t>(element & 7);
  if (shift == 0) return a;
  const Uint4 b = philox4x32(key, group + 1);
  uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  STROMA_UNROLL
  for (int i = 0; i < 6; ++i) w[i] = (shift & 4) ? w[i + 2] : w[i];
  STROMA_UNROLL
  for (int i = 0; i < 5; ++i) w[i] = (shift & 2) ? w[i + 1] : w[i];
  STROMA_UNROLL
  for (int i = 0; i < 4; ++i) w[i] = (shift & 1) ? (w[i] >> 16) | (w[i + 1] << 16) : w[i];
  return {w[0], w[1], w[2], w[3]};
}

}  // namespace stroma
