// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): a counter-based generator.
// A draw depends on its key and counter alone, so any schedule, thread count or recompute sees the same numbers.
#pragma once
#include <initializer_list>

#include "kernels/hd.h"

namespace stroma {

struct PhiloxKey {
  uint32_t k0, k1;
};

// Folds (seed, step, micro-batch, block, site) into 64 bits with the finaliser of MurmurHash3 between the words.
inline PhiloxKey philox_key(int64_t seed, int64_t step, int64_t micro_batch, int64_t block, int64_t site) {
  uint64_t h = 0x9e3779b97f4a7c15ull;
  for (const int64_t word : {seed, step, micro_batch, block, site}) {
    h ^= static_cast<uint64_t>(word);
    h ^= h >> 33;
    h *= 0xff51afd7ed558ccdull;
    h ^= h >> 33;
    h *= 0xc4ceb9fe1a85ec53ull;
    h ^= h >> 33;
    h += 0x9e3779b97f4a7c15ull;
  }
  return {static_cast<uint32_t>(h), static_cast<uint32_t>(h >> 32)};
}

struct Uint4 {
  uint32_t x, y, z, w;
};

STROMA_HD Uint4 philox4x32(PhiloxKey key, uint64_t counter) {
  Uint4 c{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0u, 0u};
  STROMA_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c.x;
    const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c.z;
    c = Uint4{static_cast<uint32_t>(b >> 32) ^ c.y ^ key.k0, static_cast<uint32_t>(b),
              static_cast<uint32_t>(a >> 32) ^ c.w ^ key.k1, static_cast<uint32_t>(a)};
    key.k0 += 0x9E3779B9u;
    key.k1 += 0xBB67AE85u;
  }
  return c;
}

// Keep probability as a threshold on 32 bits: an element is kept when its draw is below it.
inline uint64_t keep_threshold(double p) { return static_cast<uint64_t>((1.0 - p) * 4294967296.0); }

}  // namespace stroma
