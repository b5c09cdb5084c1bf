// Where each tensor lies in the flat buffers of its block: the rules of src/plan/layout.ts, in C++.
#pragma once
#include <algorithm>

#include "engine/graph.h"

namespace stroma::engine {

constexpr int64_t kAlignElements = 256;  // of every tensor in every buffer; also the blocksize of quantized state
constexpr int64_t kAlignBytes = 256;
constexpr int64_t kPage = 4096;  // every buffer's length is a multiple
constexpr int64_t kLeastQuantized = 4096;

constexpr int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// An owned tensor, or what a shard has of it. Offsets into param are in elements, into state in bytes; -1 where the
// format has no such part.
struct TensorLayout {
  int parameter;
  int64_t elements, room;
  int64_t param;
  int64_t begin = 0;  // of the whole tensor: the first element that is here
  int64_t master = -1, first = -1, second = -1, absmax1 = -1, absmax2 = -1;  // moments: exp_avg or state1, ...
  bool quantized = false;
};

// Elements [begin, end).
struct Range {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

struct BlockLayout {
  std::vector<TensorLayout> trainable, frozen;
  std::vector<TensorLayout> owned;  // whole, trainable ones first: where tensors lie in compute and in partial
  std::vector<int64_t> sums;        // by index among the block's parameters: element offset, -1 for a frozen one
  int64_t each = 0;                 // elements of a shard
  Range all, trained;               // elements of all owned tensors, of the trainable ones
  Range shard(const Range& of, int k) const { return {std::min(k * each, of.end), std::min((k + 1) * each, of.end)}; }
  int64_t param_bytes = 0, compute_bytes = 0, state_bytes = 0, sums_bytes = 0;
};

struct RetainedLayout {
  std::vector<int64_t> value, absmax;  // by trainable tensor: byte offsets
  int64_t bytes = 0;
};

// dtype: the graph's; the shard is one of `shards`. Throws GRAPH for impossible shapes.
std::vector<BlockLayout> layout_blocks(const Graph& graph, at::ScalarType dtype, const StateFormat& format,
                                       int shards = 1, int shard = 0);
RetainedLayout layout_retained(const BlockLayout& block, RetainedDType dtype);
// Everything on the device, one block after the other, and room for the sums of all blocks behind it: what a resident
// tape needs, and what a session without a placement has.
Placement resident_placement(const std::vector<BlockLayout>& blocks);
// fp64 sums and moments in a float64 graph, else fp32.
constexpr at::ScalarType wide_of(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace stroma::engine
