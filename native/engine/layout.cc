#include "engine/layout.h"

#include "engine/error.h"

namespace stroma::engine {
namespace {

int64_t element_count(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t size : shape)
    if (size < 0 || __builtin_mul_overflow(n, size, &n) || n > INT64_MAX / 64)
      fail("GRAPH", "[graph] a parameter has an impossible shape");
  return n;
}

int64_t absmax_bytes(int64_t room) { return round_up(room / kAlignElements * 4, kAlignBytes); }

// What a range of a block's elements has of its tensors.
std::vector<TensorLayout> pieces(const std::vector<TensorLayout>& whole, const Range& range) {
  std::vector<TensorLayout> result;
  for (const TensorLayout& t : whole) {
    const int64_t from = std::max(range.begin, t.param), to = std::min(range.end, t.param + t.elements);
    const bool empty_here = t.elements == 0 && range.begin == 0;
    if (to <= from && !empty_here) continue;
    TensorLayout piece = t;
    piece.begin = empty_here ? 0 : from - t.param;
    piece.elements = empty_here ? 0 : to - from;
    piece.room = round_up(piece.elements, kAlignElements);
    piece.param = empty_here ? 0 : from - range.begin;
    result.push_back(piece);
  }
  return result;
}

}  // namespace

std::vector<BlockLayout> layout_blocks(const Graph& graph, at::ScalarType dtype, const StateFormat& format, int shards,
                                       int shard) {
  const int64_t wide = static_cast<int64_t>(c10::elementSize(wide_of(dtype)));
  const int64_t stored = static_cast<int64_t>(c10::elementSize(format.storage));
  const int64_t computed = static_cast<int64_t>(c10::elementSize(dtype));
  std::vector<BlockLayout> blocks(graph.blocks.size());
  for (size_t b = 0; b < blocks.size(); ++b) {
    BlockLayout& block = blocks[b];
    int64_t sums = 0;
    for (const int index : graph.blocks[b].parameters) {
      const ParameterSpec& spec = graph.parameters[index];
      const int64_t elements = element_count(spec.shape), room = round_up(elements, kAlignElements);
      block.sums.push_back(spec.trainable ? sums : -1);
      if (spec.trainable) sums += room;
      if (spec.owner == static_cast<int>(b))
        (spec.trainable ? block.trainable : block.frozen).push_back({index, elements, room, 0});
    }
    int64_t whole = 0, state = 0;
    for (auto* list : {&block.trainable, &block.frozen}) {
      for (TensorLayout& t : *list) {
        t.param = whole;
        whole += t.room;
        t.quantized = list == &block.trainable && format.eight_bit && t.elements >= kLeastQuantized;
        block.owned.push_back(t);
      }
      if (list == &block.trainable) block.trained = {0, whole};
    }
    block.all = {0, whole};
    block.each = shards == 1 ? whole : round_up((whole + shards - 1) / shards, kAlignElements);
    const Range mine = block.shard(block.all, shard);
    block.trainable = pieces(block.trainable, mine);
    block.frozen = pieces(block.frozen, mine);
    const auto take = [&state](int64_t bytes) {
      const int64_t offset = state;
      state += bytes;
      return offset;
    };
    for (TensorLayout& t : block.trainable) {
      if (format.master != MasterWeight::kNone)
        t.master = take(t.room * (format.master == MasterWeight::kFloat32 ? 4 : 2));
      const int64_t moment = t.quantized ? t.room : round_up(t.room * wide, kAlignBytes);
      t.first = take(moment);
      t.second = take(moment);
      if (t.quantized) {
        t.absmax1 = take(absmax_bytes(t.room));
        t.absmax2 = take(absmax_bytes(t.room));
      }
    }
    block.param_bytes = round_up(mine.size() * stored, kPage);
    block.compute_bytes = shards > 1                ? whole * computed
                          : format.storage == dtype ? 0
                                                    : round_up(whole * computed, kPage);
    block.state_bytes = round_up(state, kPage);
    block.sums_bytes = round_up(sums * wide, kPage);
  }
  return blocks;
}

RetainedLayout layout_retained(const BlockLayout& block, RetainedDType dtype) {
  RetainedLayout result;
  for (const TensorLayout& t : block.trainable) {
    result.value.push_back(result.bytes);
    switch (dtype) {
      case RetainedDType::kFloat32:
        result.bytes += t.room * 4;
        break;
      case RetainedDType::kFloat64:
        result.bytes += t.room * 8;
        break;
      case RetainedDType::kBFloat16:
        result.bytes += t.room * 2;
        break;
      case RetainedDType::kDynamic8:
        result.bytes += t.room;
        break;
    }
    result.absmax.push_back(dtype == RetainedDType::kDynamic8 ? result.bytes : -1);
    if (dtype == RetainedDType::kDynamic8) result.bytes += absmax_bytes(t.room);
  }
  result.bytes = round_up(result.bytes, kPage);
  return result;
}

Placement resident_placement(const std::vector<BlockLayout>& blocks) {
  Placement placement;
  const auto take = [&placement](int64_t bytes) -> std::optional<Place> {
    if (bytes == 0) return std::nullopt;
    const Place place{Space::kDevice, placement.device_bytes, bytes};
    placement.device_bytes += bytes;
    return place;
  };
  for (const BlockLayout& block : blocks) {
    placement.param.push_back(take(block.param_bytes));
    placement.state.push_back(take(block.state_bytes));
  }
  for (const BlockLayout& block : blocks) placement.device_bytes += block.sums_bytes + block.compute_bytes;
  return placement;
}

}  // namespace stroma::engine
