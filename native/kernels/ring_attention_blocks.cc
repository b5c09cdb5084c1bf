// A pair of blocks runs on libtorch's flash kernels where they take it, else on matmuls in fp32 (fp64 for fp64).
//
// CPU: _scaled_dot_product_flash_attention_for_cpu takes fp64, fp32, bf16, fp16, grouped heads and an additive mask;
// it refuses V != H. Its logsumexp is 0, not -inf, for a query that sees nothing: put right here. bf16 and fp16 run in
// fp32: each pair's part rounded to bf16 before it is summed was off by up to 2.6 times what plain attention is.
// CUDA: _scaled_dot_product_flash_attention takes bf16 and fp16 without a mask on compute capability 8.0 and later;
// fp32, documents and V != H take the matmuls. The CUDA side has been compiled, never run.
#include "kernels/ring_attention_blocks.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>

#include <limits>

namespace stroma {
namespace {

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

enum class Kernel { flash_cpu, flash_cuda, matmul };

Kernel choose(const BlockPair& p) {
  const auto dtype = p.q.scalar_type();
  const bool narrow = dtype == at::kBFloat16 || dtype == at::kHalf;
  if (p.v.size(3) != p.q.size(3)) return Kernel::matmul;
  if (p.q.is_cpu() && (narrow || dtype == at::kFloat || dtype == at::kDouble)) return Kernel::flash_cpu;
  if (p.q.is_cuda() && narrow && !p.keep.defined() && p.q.size(3) <= 256 && p.q.size(3) % 8 == 0)
    return Kernel::flash_cuda;
  return Kernel::matmul;
}

// The kernels walk rows of the last dimension.
at::Tensor rows(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// [B, 1, t, s], 0 or -inf: added to the scores.
at::Tensor additive(const at::Tensor& keep, at::ScalarType dtype) {
  return at::zeros(keep.sizes(), keep.options().dtype(dtype))
      .masked_fill_(keep.logical_not(), kMinusInfinity)
      .unsqueeze(1);
}

std::optional<at::Tensor> flash_mask(const BlockPair& p, at::ScalarType dtype) {
  if (!p.keep.defined()) return std::nullopt;
  return additive(p.keep, dtype);
}

// The flash kernel of CUDA has heads of its own for every query head.
at::Tensor every_head(const at::Tensor& x, int64_t heads) {
  return x.size(1) == heads ? x : x.repeat_interleave(heads / x.size(1), 1);
}
at::Tensor group_sum(const at::Tensor& dx, int64_t heads) {
  return dx.size(1) == heads ? dx : dx.unflatten(1, {heads, dx.size(1) / heads}).sum(2);
}

// Query heads in their groups, everything in the dtype of accumulation.
struct Matmuls {
  at::Tensor q;  // [B, K, G, t, H]
  at::Tensor k;  // [B, K, 1, s, H]
  at::Tensor v;  // [B, K, 1, s, V]
  at::ScalarType wide;

  explicit Matmuls(const BlockPair& p) : wide(at::toOpMathType(p.q.scalar_type())) {
    q = grouped(p.q, p);
    k = p.k.to(wide).unsqueeze(2);
    v = p.v.to(wide).unsqueeze(2);
  }
  // [B, N, t, *] -> [B, K, G, t, *]
  at::Tensor grouped(const at::Tensor& x, const BlockPair& p) const {
    return x.to(wide).unflatten(1, {p.k.size(1), p.q.size(1) / p.k.size(1)});
  }
  at::Tensor scores(const BlockPair& p) const {
    at::Tensor s = at::matmul(q, k.transpose(-1, -2)).mul_(p.scale);
    if (p.keep.defined()) return s.add_(additive(p.keep, wide).unsqueeze(1));
    if (!p.causal) return s;
    const at::Tensor ahead = at::ones({s.size(-2), s.size(-1)}, s.options().dtype(at::kBool)).triu(1);
    return s.masked_fill_(ahead, kMinusInfinity);
  }
};

// logsumexp with 0 for -inf: a row that sees nothing then has probabilities exp(-inf - 0) = 0 instead of NaN.
at::Tensor finite(const at::Tensor& logsumexp) {
  return logsumexp.masked_fill(logsumexp.eq(kMinusInfinity), 0).unsqueeze(-1);
}

std::tuple<at::Tensor, at::Tensor> matmul_forward(const BlockPair& p) {
  const Matmuls m(p);
  at::Tensor s = m.scores(p);
  const at::Tensor logsumexp = s.logsumexp(-1);
  const at::Tensor probabilities = s.sub_(finite(logsumexp)).exp_();
  const at::Tensor out = at::matmul(probabilities, m.v);
  return {out.flatten(1, 2).to(p.q.scalar_type()), logsumexp.flatten(1, 2)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> matmul_backward(const BlockPair& p, const at::Tensor& grad_out,
                                                               const at::Tensor& out, const at::Tensor& logsumexp) {
  const Matmuls m(p);
  const auto dtype = p.q.scalar_type();
  const at::Tensor g = m.grouped(grad_out, p);
  const at::Tensor delta = (g * m.grouped(out, p)).sum(-1, true);
  const at::Tensor probabilities = m.scores(p).sub_(finite(m.grouped(logsumexp.unsqueeze(-1), p).squeeze(-1))).exp_();
  const at::Tensor dv = at::matmul(probabilities.transpose(-1, -2), g).sum(2);
  const at::Tensor ds = at::matmul(g, m.v.transpose(-1, -2)).sub_(delta).mul_(probabilities).mul_(p.scale);
  const at::Tensor dq = at::matmul(ds, m.k).flatten(1, 2);
  const at::Tensor dk = at::matmul(ds.transpose(-1, -2), m.q).sum(2);
  return {dq.to(dtype), dk.to(dtype), dv.to(dtype)};
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> block_forward(const BlockPair& p) {
  switch (choose(p)) {
    case Kernel::flash_cpu: {
      const auto wide = at::toOpMathType(p.q.scalar_type());
      auto [out, logsumexp] = at::_scaled_dot_product_flash_attention_for_cpu(
          rows(p.q.to(wide)), rows(p.k.to(wide)), rows(p.v.to(wide)), 0.0, p.causal && !p.keep.defined(),
          flash_mask(p, wide), p.scale);
      if (p.keep.defined()) {
        const at::Tensor sees_none = p.keep.any(-1).logical_not_().unsqueeze(1);
        logsumexp = logsumexp.masked_fill(sees_none, kMinusInfinity);
      }
      return {out, logsumexp};
    }
    case Kernel::flash_cuda: {
      const int64_t heads = p.q.size(1);
      const auto result = at::_scaled_dot_product_flash_attention(
          rows(p.q), every_head(p.k, heads), every_head(p.v, heads), 0.0, p.causal, false, p.scale);
      return {std::get<0>(result), std::get<1>(result)};
    }
    case Kernel::matmul:
      break;
  }
  return matmul_forward(p);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> block_backward(const BlockPair& p, const at::Tensor& grad_out,
                                                              const at::Tensor& out, const at::Tensor& logsumexp) {
  switch (choose(p)) {
    case Kernel::flash_cpu: {
      const auto wide = at::toOpMathType(p.q.scalar_type());
      return at::_scaled_dot_product_flash_attention_for_cpu_backward(
          rows(grad_out.to(wide)), rows(p.q.to(wide)), rows(p.k.to(wide)), rows(p.v.to(wide)), rows(out.to(wide)),
          logsumexp, 0.0, p.causal && !p.keep.defined(), flash_mask(p, wide), p.scale);
    }
    case Kernel::flash_cuda: {
      // Without dropout the kernel reads no random state; it wants the tensors all the same.
      const int64_t heads = p.q.size(1), kv_heads = p.k.size(1);
      const at::Tensor seed = at::zeros({2}, p.q.options().dtype(at::kUInt64));
      const at::Tensor offset = at::zeros({}, p.q.options().dtype(at::kUInt64));
      const auto [dq, dk, dv] = at::_scaled_dot_product_flash_attention_backward(
          rows(grad_out), rows(p.q), every_head(p.k, heads), every_head(p.v, heads), rows(out), logsumexp.contiguous(),
          at::Tensor(), at::Tensor(), p.q.size(2), p.k.size(2), 0.0, p.causal, seed, offset, p.scale);
      return {dq, group_sum(dk, kv_heads), group_sum(dv, kv_heads)};
    }
    case Kernel::matmul:
      break;
  }
  return matmul_backward(p, grad_out, out, logsumexp);
}

void merge_blocks(at::Tensor out, at::Tensor logsumexp, const at::Tensor& more_out, const at::Tensor& more_logsumexp) {
  const at::Tensor total = at::logaddexp(logsumexp, more_logsumexp);
  const auto weight = [&](const at::Tensor& part) { return (part - total).exp_().unsqueeze(-1); };
  out.mul_(weight(logsumexp)).add_(more_out.to(out.scalar_type()).mul_(weight(more_logsumexp)));
  logsumexp.copy_(total);
}

}  // namespace stroma
