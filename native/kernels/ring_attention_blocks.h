// Attention of some queries over one block of keys and values, its gradients, and the merging of blocks.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace stroma {

// Queries against one block. t queries, s keys.
struct BlockPair {
  at::Tensor q;     // [B, N, t, H]
  at::Tensor k;     // [B, K, s, H]
  at::Tensor v;     // [B, K, s, V]
  bool causal;      // query i sees key j where j <= i; t = s then
  at::Tensor keep;  // bool [B, t, s], true: attend (what causal hides is false in it too); undefined: everything
  double scale;
};

// -> out [B, N, t, V] in q's dtype, logsumexp [B, N, t] of the scaled scores in fp32 (fp64 for fp64). A query that
// sees no key gets out = 0 and logsumexp = -inf.
std::tuple<at::Tensor, at::Tensor> block_forward(const BlockPair& p);

// -> dq, dk, dv: what the block adds to the gradients, given gradient, result and logsumexp of the *whole* attention
// (Dao et al., arXiv 2205.14135, algorithm 4: the probabilities of a block need nothing else of the other blocks).
std::tuple<at::Tensor, at::Tensor, at::Tensor> block_backward(const BlockPair& p, const at::Tensor& grad_out,
                                                              const at::Tensor& out, const at::Tensor& logsumexp);

// out [B, N, t, V] and logsumexp [B, N, t] become those of both: in place, in their dtype (fp32 or fp64). Exact
// arithmetic would not depend on the order; rounding does, so callers merge in one order.
void merge_blocks(at::Tensor out, at::Tensor logsumexp, const at::Tensor& more_out, const at::Tensor& more_logsumexp);

}  // namespace stroma
