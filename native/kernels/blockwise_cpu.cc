// stroma::quantize_blockwise_ and dequantize_blockwise_, CPU twin, and the maps. Contract: the code (uint8) and absmax
// (float32, one for each 256 elements) are overwritten, x is only read; all flat and contiguous. A block that holds a
// NaN or an infinity has it as its absmax and comes back with no finite value: nothing is lost in silence.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linspace.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "kernels/checks.h"
#include "kernels/clones.h"
#include "kernels/tiles.h"

namespace stroma {
namespace {

// bitsandbytes.functional.create_dynamic_map(is_signed, 7, 8), operation by operation.
std::vector<float> map_values(bool is_signed) {
  std::vector<float> values{0.0f, 1.0f};
  for (int decade = 0; decade < 7; ++decade) {
    const int64_t items = int64_t{1} << (is_signed ? decade : decade + 1);
    const at::Tensor bounds = at::linspace(0.1, 1, items + 1, at::TensorOptions().dtype(at::kFloat).device(at::kCPU));
    const float* b = bounds.const_data_ptr<float>();
    const float scale = static_cast<float>(std::pow(10.0, decade - 6));
    for (int64_t i = 0; i < items; ++i) {
      const float value = scale * ((b[i] + b[i + 1]) / 2.0f);
      values.push_back(value);
      if (is_signed) values.push_back(-value);
    }
  }
  std::sort(values.begin(), values.end());
  return values;
}

// Least float at or above a that is nearer to b (strictly, or at least as near).
float boundary(float a, float b, bool strictly) {
  uint32_t low = float_bits(a), high = float_bits(b);
  while (low < high) {
    const uint32_t mid = low + (high - low) / 2;
    const float to_a = bits_float(mid) - a, to_b = b - bits_float(mid);
    if (strictly ? to_b < to_a : to_b <= to_a)
      high = mid;
    else
      low = mid + 1;
  }
  return bits_float(low);
}

template <bool Signed>
DynamicMap<Signed> make_map() {
  using Map = DynamicMap<Signed>;
  Map map;
  const std::vector<float> values = map_values(Signed);
  std::copy(values.begin(), values.end(), map.value);
  int code = 0;
  const float* magnitude = map.value + Map::kZero;
  for (int c = 0; c < Map::kCells; ++c) {
    // Twice a float's bits, plus one below zero: the order in which nearest_code compares.
    const uint64_t begin = static_cast<uint64_t>((kFirstCell >> Map::kShift) + c) << (Map::kShift + 1);
    map.cell[c] = static_cast<uint32_t>(code) << 24 | Map::kNoBoundary;
    if (magnitude[code] == 1.0f) continue;
    const float above = boundary(magnitude[code], magnitude[code + 1], true);
    const float below = boundary(magnitude[code], magnitude[code + 1], false);
    const uint64_t at = 2 * static_cast<uint64_t>(float_bits(above)) - (above != below ? 1 : 0);
    if (at >= begin + Map::kNoBoundary) continue;
    map.cell[c] = static_cast<uint32_t>(code++) << 24 | static_cast<uint32_t>(at - begin);
    TORCH_INTERNAL_ASSERT(at >= begin && float_bits(above) - float_bits(below) <= 1);
  }
  TORCH_INTERNAL_ASSERT(magnitude[code] == 1.0f, "a cell holds two boundaries");
  return map;
}

template <bool Signed, bool KeepSign>
CodeTable<Signed> make_table(const DynamicMap<Signed>& map) {
  using Table = CodeTable<Signed>;
  constexpr uint32_t kSize = 1u << Table::kShift;
  CodeTable<Signed> table;
  for (uint32_t cell = 0; cell < std::size(table.entry); ++cell) {
    const uint32_t begin = cell << Table::kShift;
    // The code, or 255 - code below zero, of the cell's value number `low`: does not fall with it.
    const auto rising = [&](uint32_t low) {
      const int32_t code = nearest_code<Signed, KeepSign>(map.cell, bits_float(begin + low), 1.0f);
      return static_cast<uint32_t>(begin >> 31 ? 255 - code : code);
    };
    const uint32_t first = rising(0), last = rising(kSize - 1);
    TORCH_INTERNAL_ASSERT(last - first <= 1, "a cell holds two boundaries");
    uint32_t next = first == last ? kSize : 0;  // where the next code begins
    for (uint32_t high = kSize - 1; next < high;) {
      const uint32_t mid = next + (high - next) / 2;
      if (rising(mid) == last)
        high = mid;
      else
        next = mid + 1;
    }
    table.entry[cell] = (first << 24) + ((kSize - next) << Table::kLift) - (begin << Table::kLift);
  }
  return table;
}

STROMA_CLONES void decode(const float* __restrict value, const uint8_t* __restrict code, float absmax,
                          float* __restrict out) {
  decode_block(value, code, absmax, out);
}
STROMA_CLONES void encode_signed(const uint32_t* __restrict entry, const float* __restrict x, float* __restrict absmax,
                                 uint8_t* __restrict code) {
  encode_block<true>(entry, x, most_of_block(x), absmax, code);
}
STROMA_CLONES void encode_unsigned(const uint32_t* __restrict entry, const float* __restrict x,
                                   float* __restrict absmax, uint8_t* __restrict code) {
  encode_block<false>(entry, x, most_of_block(x), absmax, code);
}

// Runs `block(index, begin, size)` over the blocks of n elements on the intra-op threads.
template <typename F>
void for_blocks(int64_t n, const F& block) {
  at::parallel_for(0, quant_blocks(n), 64, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) block(b, b * kQuantBlock, std::min(kQuantBlock, n - b * kQuantBlock));
  });
}

template <typename T>
void quantize(const T* x, uint8_t* code, float* absmax, bool is_signed, int64_t n) {
  for_blocks(n, [&](int64_t b, int64_t begin, int64_t size) {
    alignas(64) float values[kQuantBlock] = {};
    alignas(64) uint8_t codes[kQuantBlock];
    if constexpr (std::is_same_v<T, float>)
      std::copy_n(x + begin, size, values);
    else
      convert(x + begin, values, size);
    if (is_signed)
      encode_signed(code_table<true, false>().entry, values, absmax + b, codes);
    else
      encode_unsigned(code_table<false, false>().entry, values, absmax + b, codes);
    std::copy_n(codes, size, code + begin);
  });
}

template <typename T>
void dequantize(const uint8_t* code, const float* absmax, bool is_signed, T* out, int64_t n) {
  const float* value = is_signed ? signed_map().value : unsigned_map().value;
  for_blocks(n, [&](int64_t b, int64_t begin, int64_t size) {
    alignas(64) float values[kQuantBlock];
    const Padded<uint8_t> codes(code + begin, size);
    decode(value, codes.data, absmax[b], values);
    if constexpr (std::is_same_v<T, float>)
      std::copy_n(values, size, out + begin);
    else
      convert(values, out + begin, size);
  });
}

void quantize_cpu(const at::Tensor& x, at::Tensor& code, at::Tensor& absmax, bool is_signed) {
  check_blockwise("quantize_blockwise_", x, code, absmax);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "stroma::quantize_blockwise_", [&] {
    quantize(x.const_data_ptr<scalar_t>(), code.mutable_data_ptr<uint8_t>(), absmax.mutable_data_ptr<float>(),
             is_signed, x.numel());
  });
}

void dequantize_cpu(const at::Tensor& code, const at::Tensor& absmax, bool is_signed, at::Tensor& out) {
  check_blockwise("dequantize_blockwise_", out, code, absmax);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, out.scalar_type(), "stroma::dequantize_blockwise_", [&] {
    dequantize(code.const_data_ptr<uint8_t>(), absmax.const_data_ptr<float>(), is_signed,
               out.mutable_data_ptr<scalar_t>(), out.numel());
  });
}

at::Tensor dynamic_map(bool is_signed) {
  at::Tensor out = at::empty({256}, at::TensorOptions().dtype(at::kFloat).device(at::kCPU));
  std::copy_n(is_signed ? signed_map().value : unsigned_map().value, 256, out.mutable_data_ptr<float>());
  return out;
}

}  // namespace

const DynamicMap<true>& signed_map() {
  static const DynamicMap<true> map = make_map<true>();
  return map;
}
const DynamicMap<false>& unsigned_map() {
  static const DynamicMap<false> map = make_map<false>();
  return map;
}

template <bool Signed, bool KeepSign>
const CodeTable<Signed>& code_table() {
  static const CodeTable<Signed> table = [] {
    if constexpr (Signed)
      return make_table<Signed, KeepSign>(signed_map());
    else
      return make_table<Signed, KeepSign>(unsigned_map());
  }();
  return table;
}
template const CodeTable<true>& code_table<true, true>();
template const CodeTable<true>& code_table<true, false>();
template const CodeTable<false>& code_table<false, false>();

#define STROMA_CONVERT(From, To)                                                          \
  STROMA_CLONES void convert(const From* __restrict from, To* __restrict to, int64_t n) { \
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<To>(from[i]);                     \
  }
STROMA_CONVERT(c10::BFloat16, float)
STROMA_CONVERT(c10::BFloat16, double)
STROMA_CONVERT(double, float)
STROMA_CONVERT(float, double)
STROMA_CONVERT(float, c10::BFloat16)
#undef STROMA_CONVERT

TORCH_LIBRARY_IMPL(stroma, CPU, m) {
  m.impl("quantize_blockwise_", quantize_cpu);
  m.impl("dequantize_blockwise_", dequantize_cpu);
}
TORCH_LIBRARY_IMPL(stroma, CompositeExplicitAutograd, m) { m.impl("dynamic_map", dynamic_map); }

}  // namespace stroma
