// How a sequence is dealt out to ranks, what both operators check, and attention on one rank.
#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <cmath>

#include "kernels/ring_attention.h"

namespace stroma {
namespace {

void check_ranks(const char* op, int64_t rank, int64_t ranks) {
  TORCH_CHECK(ranks >= 1 && rank >= 0 && rank < ranks, "[stroma::", op, "] expected 0 <= rank < ranks, got rank ", rank,
              " of ", ranks);
}

// Tokens of one chunk: a rank holds one, or two in zigzag.
int64_t chunk_length(const char* op, int64_t tokens, int64_t ranks, bool zigzag) {
  const int64_t chunks = zigzag ? 2 * ranks : ranks;
  TORCH_CHECK(tokens % chunks == 0, "[stroma::", op, "] expected a sequence length that is a multiple of ", chunks,
              " (", zigzag ? "two chunks" : "one chunk", " for each of ", ranks, " ranks), got ", tokens,
              ": pad the sequence, giving the padding a document of its own");
  return tokens / chunks;
}

// int64 [tokens / ranks]: places in the whole sequence of the tokens that `rank` holds, in its order.
at::Tensor sequence_positions(int64_t tokens, int64_t rank, int64_t ranks, bool zigzag) {
  constexpr const char* op = "sequence_positions";
  check_ranks(op, rank, ranks);
  const int64_t chunk = chunk_length(op, tokens, ranks, zigzag);
  const auto from = [&](int64_t c) { return at::arange(c * chunk, (c + 1) * chunk, at::kLong); };
  return zigzag ? at::cat({from(rank), from(2 * ranks - 1 - rank)}) : from(rank);
}

}  // namespace

at::Tensor split_sequence(const at::Tensor& x, int64_t dim, int64_t rank, int64_t ranks, bool zigzag) {
  constexpr const char* op = "split_sequence";
  check_ranks(op, rank, ranks);
  const int64_t chunk = chunk_length(op, x.size(dim), ranks, zigzag);
  if (!zigzag) return x.narrow(dim, rank * chunk, chunk).contiguous();
  return at::cat({x.narrow(dim, rank * chunk, chunk), x.narrow(dim, (2 * ranks - 1 - rank) * chunk, chunk)}, dim);
}

at::Tensor merge_sequence(at::TensorList shares, int64_t dim, bool zigzag) {
  TORCH_CHECK(!shares.empty(), "[stroma::merge_sequence] expected a share for each rank, got none");
  if (!zigzag) return at::cat(shares, dim);
  std::vector<at::Tensor> chunks(2 * shares.size());
  for (size_t r = 0; r < shares.size(); ++r) {
    const int64_t chunk = chunk_length("merge_sequence", shares[r].size(dim), 1, true);
    chunks[r] = shares[r].narrow(dim, 0, chunk);
    chunks[chunks.size() - 1 - r] = shares[r].narrow(dim, chunk, chunk);
  }
  return at::cat(chunks, dim);
}

SequenceAttention check_sequence_attention(const char* op, const at::Tensor& q, const at::Tensor& k,
                                           const at::Tensor& v, const std::optional<at::Tensor>& document_ids,
                                           bool is_causal, std::optional<double> scale, double dropout_p) {
  TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4 && k.size(0) == q.size(0) && k.size(2) == q.size(2) &&
                  k.size(3) == q.size(3) && v.size(0) == k.size(0) && v.size(1) == k.size(1) && v.size(2) == k.size(2),
              "[stroma::", op, "] expected q [B, N, t, H], k [B, K, t, H] and v [B, K, t, V], got ", q.sizes(), ", ",
              k.sizes(), " and ", v.sizes());
  TORCH_CHECK(q.numel() > 0 && v.numel() > 0, "[stroma::", op, "] expected no empty dimension, got q ", q.sizes(),
              " and v ", v.sizes());
  TORCH_CHECK(q.size(1) % k.size(1) == 0, "[stroma::", op,
              "] expected query heads to be a multiple of key/value heads, got ", q.size(1), " and ", k.size(1));
  TORCH_CHECK(q.is_floating_point() && k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type() &&
                  k.device() == q.device() && v.device() == q.device(),
              "[stroma::", op, "] expected q, k and v of one floating dtype on one device, got ", q.scalar_type(),
              " on ", q.device(), ", ", k.scalar_type(), " on ", k.device(), " and ", v.scalar_type(), " on ",
              v.device());
  TORCH_CHECK(dropout_p == 0, "[stroma::", op, "] expected dropout_p = 0, got ", dropout_p,
              ": attention over several ranks draws no dropout; drop out its result instead");
  const bool documents = document_ids.has_value() && document_ids->defined();
  if (documents) {
    TORCH_CHECK(document_ids->scalar_type() == at::kLong && document_ids->dim() == 2 &&
                    document_ids->size(0) == q.size(0) && document_ids->size(1) == q.size(2) &&
                    document_ids->device() == q.device(),
                "[stroma::", op, "] expected document_ids int64 [", q.size(0), ", ", q.size(2), "] on ", q.device(),
                ", got ", document_ids->scalar_type(), " ", document_ids->sizes(), " on ", document_ids->device());
  }
  return {op,
          q,
          k,
          v,
          documents ? document_ids : std::nullopt,
          is_causal,
          scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(q.size(3)))};
}

at::Tensor whole_attention(const SequenceAttention& a) {
  const bool grouped = a.q.size(1) != a.k.size(1);
  std::optional<at::Tensor> mask;
  if (a.document_ids.has_value()) {
    at::Tensor same = a.document_ids->unsqueeze(2).eq(a.document_ids->unsqueeze(1)).unsqueeze(1);  // [B, 1, T, T]
    mask = a.causal ? same.tril() : same;
  }
  return at::scaled_dot_product_attention(a.q, a.k, a.v, mask, 0.0, a.causal && !mask.has_value(), a.scale, grouped);
}

TORCH_LIBRARY_IMPL(stroma, CompositeImplicitAutograd, m) {
  m.impl("split_sequence", split_sequence);
  m.impl("merge_sequence", merge_sequence);
  m.impl("sequence_positions", sequence_positions);
}

}  // namespace stroma
