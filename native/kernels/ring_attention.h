// Attention over a sequence that is split over the ranks of a process group. What the two operators share.
//
//   ring_attention       key/value blocks travel round the ring of ranks while every rank computes on the one it holds:
//                        Liu, Zaharia, Abbeel, arXiv 2310.01889. Any number of heads.
//   all_to_all_attention heads are dealt out to the ranks, each attends over the whole sequence: Jacobs et al.
//                        (DeepSpeed-Ulysses), arXiv 2309.14509. Query heads are a multiple of R.
//
// Both: (q, k, v, document_ids, is_causal, scale, group, dropout_p) -> out, on every rank of `group` (a c10d process
// group's name) in the same order, and their backward likewise. Shapes, for R ranks, T tokens in all and t = T / R on
// each:
//
//   q            [B, N, t, H]
//   k            [B, K, t, H]   K divides N: query head n reads key/value head n / (N / K)
//   v            [B, K, t, V]   usually V = H
//   document_ids int64 [B, t]   or none; a token attends only to tokens of the same id in its row. Padding needs an id
//                               of its own: every token then sees at least itself
//   out          [B, N, t, V]   in q's dtype, laid out [B, t, N, V] where libtorch's kernels lay it out so
//   scale        of q k^T; none: 1 / sqrt(H)
//
// Which tokens a rank holds. Causal: the zigzag. The sequence is cut into 2 R equal chunks and rank r holds chunks r
// and 2 R - 1 - r, in this order; every rank then has the same number of visible (query, key) pairs in every step of
// the ring. Not causal: any split at all, since nothing depends on positions; t tokens in one piece are the plain one.
// sequence_positions, split_sequence and merge_sequence do both. Positions of tokens (RoPE) are the caller's: he
// rotates by sequence_positions.
//
// On one rank both are at::scaled_dot_product_attention, with its bits and its derivatives. On more, a second
// derivative is refused, dropout always.
//
// Failures. Every wait ends by the process group's timeout. What a transfer throws is thrown again under the operator's
// name, with rank and peer. After that the group's ranks are out of step: it is of no further use.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

namespace stroma {

// What both operators are called with, checked. `op` names the operator in messages.
struct SequenceAttention {
  const char* op;
  at::Tensor q, k, v;
  std::optional<at::Tensor> document_ids;
  bool causal;
  double scale;
};

// Throws unless shapes, dtypes and devices fit each other and dropout_p is zero.
SequenceAttention check_sequence_attention(const char* op, const at::Tensor& q, const at::Tensor& k,
                                           const at::Tensor& v, const std::optional<at::Tensor>& document_ids,
                                           bool is_causal, std::optional<double> scale, double dropout_p);

// Attention on one rank that holds the whole sequence in order: libtorch's own, called as a block of a model calls it.
at::Tensor whole_attention(const SequenceAttention& a);

// When a second derivative is refused: the transfers in a backward have none.
inline constexpr const char* kOverRanks = " on more than one rank";

// ranks shares of one sequence -> the sequence, along `dim`; `zigzag` as in causal attention.
at::Tensor merge_sequence(at::TensorList shares, int64_t dim, bool zigzag);

// The share of `rank`. Throws where the length does not divide by ranks (zigzag: by 2 ranks).
at::Tensor split_sequence(const at::Tensor& x, int64_t dim, int64_t rank, int64_t ranks, bool zigzag);

}  // namespace stroma
