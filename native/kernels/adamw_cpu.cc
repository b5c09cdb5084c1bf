// stroma::adamw_, CPU twin. Contract: param, master, exp_avg, exp_avg_sq and their absmax are overwritten, grad is only
// read; all flat and contiguous, no aliasing. One pass over memory in tiles, split over the intra-op threads; elements
// (quantized: blocks) are independent, so any cut gives the same bits.
//
// A tile is brought into what the update computes in (float32; float64 for float64 moments), updated, and taken back.
// Whatever is stored in that type already is updated where it lies.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <bit>
#include <cstring>
#include <limits>

#include "kernels/adamw.h"
#include "kernels/checks.h"
#include "kernels/clones.h"
#include "kernels/rounding.h"
#include "kernels/tiles.h"

namespace stroma {
namespace {

// MKL's root of zero or of a subnormal number takes 5 and 30 times as long as another (measured; a table of embeddings
// is full of such second moments), and is the correctly rounded one (all 2^23 of float32 compared). So MKL is given a
// one in its place, and where a tile has any, the processor's root is put there afterwards.
template <typename T>
STROMA_HD bool is_slow_root(T v) {
  return !(v >= std::numeric_limits<T>::min());
}

// Not templates: target_clones needs plain functions. Pointers are parameters because only so does restrict hold.
#define STROMA_ADAMW_TILE(T)                                                                                \
  STROMA_CLONES bool moments(const AdamWStep<T> s, const T* __restrict g, T* __restrict m, T* __restrict v, \
                             T* __restrict root, int64_t n) {                                               \
    int32_t any = 0;                                                                                        \
    for (int64_t i = 0; i < n; ++i) {                                                                       \
      const T v_i = adamw_moments(s, g[i], m[i], v[i]);                                                     \
      const bool slow = is_slow_root(v_i);                                                                  \
      root[i] = slow ? T(1) : v_i;                                                                          \
      any |= slow ? 1 : 0;                                                                                  \
    }                                                                                                       \
    return any != 0;                                                                                        \
  }                                                                                                         \
  STROMA_CLONES void parameters(const AdamWStep<T> s, T* __restrict p, const T* __restrict m,               \
                                const T* __restrict root, int64_t n) {                                      \
    for (int64_t i = 0; i < n; ++i) p[i] = adamw_parameter(s, p[i], m[i], root[i]);                         \
  }                                                                                                         \
  STROMA_CLONES void slow_roots(const T* __restrict v, T* __restrict root, int64_t n) {                     \
    for (int64_t i = 0; i < n; ++i) root[i] = is_slow_root(v[i]) ? square_root(v[i]) : root[i];             \
  }
STROMA_ADAMW_TILE(float)
STROMA_ADAMW_TILE(double)
#undef STROMA_ADAMW_TILE

// What quantized blocks look up: as parameters of the functions below, see tiles.h.
struct QuantizedMaps {
  const float *value1, *value2;
  const uint32_t *entry1, *entry2;
};

// Updates one block, whose moments were decoded into m and v, and decodes the next one's beside it: look-ups have time
// while roots and quotients are computed.
template <bool FromMoment>
STROMA_INLINE void update_block(const AdamWStep<float>& s, const float* __restrict g, float* __restrict p,
                                float* __restrict m, float* __restrict v, int32_t* most, const float* __restrict value1,
                                const uint8_t* __restrict code1, float absmax1, float* __restrict next_m,
                                const float* __restrict value2, const uint8_t* __restrict code2, float absmax2,
                                float* __restrict next_v) {
  int32_t most1 = 0, most2 = 0;
  for (int32_t i = 0; i < kQuantBlock; ++i) {
    next_m[i] = value1[code1[i]] * absmax1;
    next_v[i] = value2[code2[i]] * absmax2;
    float p_i = p[i], m_i = m[i], v_i = v[i];
    adamw_quantized<FromMoment>(s, g[i], p_i, m_i, v_i);
    p[i] = p_i;
    m[i] = m_i;
    v[i] = v_i;
    most1 = std::max(most1, static_cast<int32_t>(magnitude_bits(m_i)));
    most2 = std::max(most2, static_cast<int32_t>(magnitude_bits(v_i)));
  }
  most[0] = most1;
  most[1] = most2;
}

// What a block some way ahead reads: bursts of five streams are not what prefetchers of processors are made for.
STROMA_INLINE void prefetch_block(const float* g, const float* p, const uint8_t* code1, const uint8_t* code2) {
  constexpr int64_t kLine = 64, kAhead = 4 * kQuantBlock, kBytes = kQuantBlock * sizeof(float);
  const auto lines = [](const void* from, int64_t bytes, auto intent) {
    for (int64_t at = 0; at < bytes; at += kLine)
      __builtin_prefetch(static_cast<const char*>(from) + at, decltype(intent)::value);
  };
  lines(g + kAhead, kBytes, std::integral_constant<int, 0>());
  lines(p + kAhead, kBytes, std::integral_constant<int, 1>());
  lines(code1 + kAhead, kQuantBlock, std::integral_constant<int, 1>());
  lines(code2 + kAhead, kQuantBlock, std::integral_constant<int, 1>());
}

template <bool FromMoment>
STROMA_INLINE void update_blocks(const AdamWStep<float>& s, const QuantizedMaps& maps, const float* g, float* p,
                                 uint8_t* code1, uint8_t* code2, float* absmax1, float* absmax2, int64_t blocks) {
  alignas(64) float m[2][kQuantBlock], v[2][kQuantBlock];
  decode_block(maps.value1, code1, absmax1[0], m[0]);
  decode_block(maps.value2, code2, absmax2[0], v[0]);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t i = b * kQuantBlock, next = std::min(b + 1, blocks - 1), j = next * kQuantBlock;
    float *m_b = m[b % 2], *v_b = v[b % 2];
    int32_t most[2];
    prefetch_block(g + i, p + i, code1 + i, code2 + i);
    update_block<FromMoment>(s, g + i, p + i, m_b, v_b, most, maps.value1, code1 + j, absmax1[next], m[(b + 1) % 2],
                             maps.value2, code2 + j, absmax2[next], v[(b + 1) % 2]);
    encode_block<true>(maps.entry1, m_b, most[0], absmax1 + b, code1 + i);
    encode_block<false>(maps.entry2, v_b, most[1], absmax2 + b, code2 + i);
  }
}

STROMA_CLONES void quantized_blocks(const AdamWStep<float> s, const QuantizedMaps maps, const float* g, float* p,
                                    uint8_t* code1, uint8_t* code2, float* absmax1, float* absmax2, int64_t blocks) {
  if (s.from_moment())
    update_blocks<true>(s, maps, g, p, code1, code2, absmax1, absmax2, blocks);
  else
    update_blocks<false>(s, maps, g, p, code1, code2, absmax1, absmax2, blocks);
}

STROMA_CLONES void round_nearest(const float* __restrict w, uint16_t* __restrict p, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = nearest_bfloat16(w[i]);
}
STROMA_CLONES void split(const float* __restrict w, uint16_t* __restrict p, int16_t* __restrict low, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const Split16 halves = split16(w[i]);
    p[i] = halves.high;
    low[i] = halves.low;
  }
}
STROMA_CLONES void join(const uint16_t* __restrict p, const int16_t* __restrict low, float* __restrict w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) w[i] = join16(p[i], low[i]);
}
// Two draws of 16 bits a word, the lower one first: as they lie in memory.
static_assert(std::endian::native == std::endian::little);
STROMA_CLONES void draw(const PhiloxKey key, uint64_t first, uint32_t* __restrict words, int64_t groups) {
  for (int64_t i = 0; i < groups; ++i) {
    const Uint4 four = philox4x32(key, first + static_cast<uint64_t>(i));
    words[4 * i] = four.x;
    words[4 * i + 1] = four.y;
    words[4 * i + 2] = four.z;
    words[4 * i + 3] = four.w;
  }
}
STROMA_CLONES void round_stochastic(const float* __restrict w, const uint16_t* __restrict draws, uint16_t* __restrict p,
                                    int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = stochastic_bfloat16(w[i], draws[i]);
}

// Five streams of a tile stay in the second-level cache between the passes.
constexpr int64_t kTile = 8192, kQuantTile = 16 * kQuantBlock;

uint16_t* bfloat16_data(const at::Tensor& t) { return reinterpret_cast<uint16_t*>(t.data_ptr<c10::BFloat16>()); }

// A tile's gradient in T.
template <typename T>
const T* gradient(const at::Tensor& grad, int64_t begin, int64_t n, T* scratch) {
  if (grad.scalar_type() == c10::CppTypeToScalarType<T>::value) return grad.const_data_ptr<T>() + begin;
  if (grad.scalar_type() == at::kBFloat16) {
    convert(grad.const_data_ptr<c10::BFloat16>() + begin, scratch, n);
  } else {
    using Other = std::conditional_t<std::is_same_v<T, float>, double, float>;
    convert(grad.const_data_ptr<Other>() + begin, scratch, n);
  }
  return scratch;
}

// A tile's weight in T: where it lies, or in scratch; put_weight takes it back.
template <typename T>
T* weight(const AdamWArguments& a, Weight kind, int64_t begin, int64_t n, T* scratch) {
  if (kind == Weight::plain) return a.param.mutable_data_ptr<T>() + begin;
  if constexpr (std::is_same_v<T, float>) {
    if (kind == Weight::master) return a.master->mutable_data_ptr<float>() + begin;
    if (kind == Weight::split)
      join(bfloat16_data(a.param) + begin, a.master->const_data_ptr<int16_t>() + begin, scratch, n);
    else
      convert(a.param.const_data_ptr<c10::BFloat16>() + begin, scratch, n);
  }
  return scratch;
}

void put_weight(const AdamWArguments& a, Weight kind, int64_t begin, int64_t n, const float* w) {
  if (kind == Weight::plain) return;
  uint16_t* p = bfloat16_data(a.param) + begin;
  if (kind == Weight::master) return round_nearest(w, p, n);
  if (kind == Weight::split) return split(w, p, a.master->mutable_data_ptr<int16_t>() + begin, n);
  const uint64_t first = static_cast<uint64_t>(a.first_element() + begin);
  const int64_t skip = static_cast<int64_t>(first % 8), groups = (skip + n + 7) / 8;
  uint32_t words[kTile / 2 + 8];
  uint16_t draws[kTile + 16];
  draw(rounding_key(a.key[0], a.key[1], a.key[2]), first / 8, words, groups);
  std::memcpy(draws, words, groups * 16);
  round_stochastic(w, draws + skip, p, n);
}

template <typename T>
void update_tile(const AdamWArguments& a, Weight kind, const AdamWStep<T>& s, int64_t begin, int64_t n,
                 const at::Tensor& scratch) {
  T* room = scratch.mutable_data_ptr<T>();
  T* root = room;
  const T* g = gradient<T>(a.grad, begin, n, room + kTile);
  T* p = weight<T>(a, kind, begin, n, room + 2 * kTile);
  T* m = a.exp_avg.mutable_data_ptr<T>() + begin;
  T* v = a.exp_avg_sq.mutable_data_ptr<T>() + begin;
  const bool slow = moments(s, g, m, v, root, n);
  scratch.narrow(0, 0, n).sqrt_();
  if (slow) slow_roots(v, root, n);
  parameters(s, p, m, root, n);
  if constexpr (std::is_same_v<T, float>) put_weight(a, kind, begin, n, p);
}

void update_quantized_tile(const AdamWArguments& a, Weight kind, const AdamWStep<float>& s, int64_t begin, int64_t n) {
  alignas(64) float room_g[kQuantTile], room_p[kQuantTile];
  const float* g = gradient<float>(a.grad, begin, n, room_g);
  float* p = weight<float>(a, kind, begin, n, room_p);
  uint8_t *code1 = a.exp_avg.mutable_data_ptr<uint8_t>() + begin,
          *code2 = a.exp_avg_sq.mutable_data_ptr<uint8_t>() + begin;
  float *absmax1 = a.absmax1->mutable_data_ptr<float>() + begin / kQuantBlock,
        *absmax2 = a.absmax2->mutable_data_ptr<float>() + begin / kQuantBlock;
  const QuantizedMaps maps{signed_map().value, unsigned_map().value, code_table<true, true>().entry,
                           code_table<false, false>().entry};
  const int64_t whole = n / kQuantBlock, i = whole * kQuantBlock;
  if (whole > 0) quantized_blocks(s, maps, g, p, code1, code2, absmax1, absmax2, whole);
  if (const int64_t rest = n - i; rest > 0) {
    // Zeros beyond the end have neither gradient nor moments, and no part in absmax.
    Padded<float> g_end(g + i, rest), p_end(p + i, rest);
    Padded<uint8_t> code1_end(code1 + i, rest, DynamicMap<true>::kZero), code2_end(code2 + i, rest);
    quantized_blocks(s, maps, g_end.data, p_end.data, code1_end.data, code2_end.data, absmax1 + whole, absmax2 + whole,
                     1);
    std::copy_n(p_end.data, rest, p + i);
    std::copy_n(code1_end.data, rest, code1 + i);
    std::copy_n(code2_end.data, rest, code2 + i);
  }
  put_weight(a, kind, begin, n, p);
}

void adamw_cpu(at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& grad, at::Tensor& exp_avg,
               at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& absmax1,
               const std::optional<at::Tensor>& absmax2, double lr, double beta1, double beta2, double epsilon,
               double weight_decay, int64_t step, double gradient_scale, at::IntArrayRef key) {
  const AdamWArguments a{param, master, grad, exp_avg, exp_avg_sq, absmax1, absmax2, step, key};
  const Weight kind = check_adamw(a);
  const int64_t n = param.numel(), tile = a.quantized() ? kQuantTile : kTile;
  const auto update = [&]<typename T>(const AdamWStep<T>& s) {
    at::parallel_for(0, (n + tile - 1) / tile, kTile / tile, [&](int64_t first, int64_t last) {
      const at::NoGradGuard no_grad;
      at::Tensor scratch;
      if (!a.quantized()) scratch = at::empty({3 * kTile}, exp_avg.options().requires_grad(false));
      for (int64_t begin = first * tile; begin < std::min(n, last * tile); begin += tile) {
        const int64_t size = std::min(tile, n - begin);
        if constexpr (std::is_same_v<T, float>) {
          if (a.quantized()) {
            update_quantized_tile(a, kind, s, begin, size);
            continue;
          }
        }
        update_tile<T>(a, kind, s, begin, size, scratch);
      }
    });
  };
  if (a.wide())
    update(AdamWStep<double>::make(lr, beta1, beta2, epsilon, weight_decay, step, gradient_scale));
  else
    update(AdamWStep<float>::make(lr, beta1, beta2, epsilon, weight_decay, step, gradient_scale));
}

void split16_cpu(const at::Tensor& x, at::Tensor& param, at::Tensor& master) {
  check_split16("split16_", x, param, master);
  const float* w = x.const_data_ptr<float>();
  uint16_t* p = bfloat16_data(param);
  int16_t* low = master.mutable_data_ptr<int16_t>();
  at::parallel_for(0, x.numel(), kTile, [&](int64_t i, int64_t end) { split(w + i, p + i, low + i, end - i); });
}

void join16_cpu(const at::Tensor& param, const at::Tensor& master, at::Tensor& out) {
  check_split16("join16_", out, param, master);
  const uint16_t* p = bfloat16_data(param);
  const int16_t* low = master.const_data_ptr<int16_t>();
  float* w = out.mutable_data_ptr<float>();
  at::parallel_for(0, out.numel(), kTile, [&](int64_t i, int64_t end) { join(p + i, low + i, w + i, end - i); });
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CPU, m) {
  m.impl("adamw_", adamw_cpu);
  m.impl("split16_", split16_cpu);
  m.impl("join16_", join16_cpu);
}

}  // namespace stroma
