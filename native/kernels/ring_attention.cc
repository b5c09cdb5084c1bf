// stroma::ring_attention. Shapes, layouts and failures: ring_attention.h.
//
// Order. In step i of R rank r computes on the keys and values of rank j = r - i (mod R), while it sends them on to
// rank r + 1 and receives the next ones. Causal, in the zigzag, of local halves a < b with t / 2 tokens each:
//
//   j = r   the local triangle                          t^2 / 2 pairs
//   j < r   all queries against half a of the block     t^2 / 2   (half b lies behind all of them)
//   j > r   queries of half b against the whole block   t^2 / 2   (half a of the queries lies before all of it)
//
// Partial results are merged by their logsumexp in fp32 (fp64), own block first, then as the blocks come: the order
// hangs on rank and R alone, so results do not depend on timing. In the backward fp32 sums of dk and dv travel behind
// their block; the owner's part enters first, then that of each rank on the way; after R hops they are at home.
//
// Traffic of a rank, bytes out (and as many in), S = size of an element, E = B K t (H + V) elements of a block:
//   forward   R - 1 steps of E S (documents: and 8 B t)
//   backward  the same again, and R steps of 4 E (8 E in fp64)
// Hidden behind a step's arithmetic of 2 N B t^2 (H + V) FLOP (causal: half of it) where t is long enough.
//
// Memory of a rank beside q, k, v, out and their gradients: two blocks (2 E S) in the forward; in the backward as many,
// and three times 4 E; one block pair's kernel workspace. All of it falls as 1 / R, document masks (B t^2 S) as 1 /
// R^2.
#include "kernels/ring_attention.h"
#include "kernels/checks.h"

#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <bit>

#include "kernels/ring_attention_blocks.h"
#include "kernels/ring_attention_peers.h"

namespace stroma {
namespace {

constexpr int kBlockTag = 0x5354'0001, kDocumentsTag = 0x5354'0002, kGradientTag = 0x5354'0003;

// A pair of tensors like k and v in one buffer, which travels in one message.
struct KeyValue {
  at::Tensor buffer, k, v;

  KeyValue() = default;
  KeyValue(const SequenceAttention& a, at::ScalarType dtype) {
    buffer = at::empty({a.k.numel() + a.v.numel()}, a.k.options().dtype(dtype));
    k = buffer.narrow(0, 0, a.k.numel()).view(a.k.sizes());
    v = buffer.narrow(0, a.k.numel(), a.v.numel()).view(a.v.sizes());
  }
};

// Keys, values and documents of one rank, as they are held or on their way.
struct Block {
  KeyValue kv;
  at::Tensor document_ids;

  static Block empty(const SequenceAttention& a) {
    return {KeyValue(a, a.k.scalar_type()),
            a.document_ids.has_value() ? at::empty(a.document_ids->sizes(), a.document_ids->options()) : at::Tensor()};
  }
  static Block own(const SequenceAttention& a) {
    Block block = empty(a);
    block.kv.k.copy_(a.k);
    block.kv.v.copy_(a.v);
    if (a.document_ids.has_value()) block.document_ids.copy_(*a.document_ids);
    return block;
  }
};

// The blocks as they come by, the next one under way while this one is used.
class Ring {
 public:
  Ring(const Peers& peers, const SequenceAttention& a) : peers_(peers), a_(a), held_(Block::own(a)) { fetch(); }

  const Block& block() const { return held_; }
  int64_t owner() const { return (peers_.rank() - step_ + peers_.ranks()) % peers_.ranks(); }
  int64_t step() const { return step_; }

  // Waits for the next block; false where every rank's has been here.
  bool next() {
    transfers_.wait();
    if (documents_) documents_->wait();
    documents_.reset();
    if (++step_ == peers_.ranks()) return false;
    std::swap(held_, incoming_);
    fetch();
    return true;
  }

 private:
  void fetch() {
    if (step_ + 1 == peers_.ranks()) {
      incoming_ = {};
      return;
    }
    if (!incoming_.kv.buffer.defined()) incoming_ = Block::empty(a_);
    transfers_ = peers_.shift(held_.kv.buffer, incoming_.kv.buffer, kBlockTag);
    if (held_.document_ids.defined())
      documents_ = peers_.shift(held_.document_ids, incoming_.document_ids, kDocumentsTag);
  }

  const Peers& peers_;
  const SequenceAttention& a_;
  int64_t step_ = 0;
  Block held_, incoming_;
  Transfers transfers_;
  std::optional<Transfers> documents_;
};

// The part of queries x block that is not masked as a whole, as ranges of rows and columns.
struct Region {
  int64_t query, queries;  // first and number
  int64_t key, keys;
  bool causal;

  static Region of(const SequenceAttention& a, int64_t rank, int64_t owner) {
    const int64_t t = a.q.size(2), half = t / 2;
    if (!a.causal) return {0, t, 0, t, false};
    if (owner == rank) return {0, t, 0, t, true};
    if (owner < rank) return {0, t, 0, half, false};
    return {half, half, 0, t, false};
  }
  at::Tensor of_queries(const at::Tensor& x) const { return x.narrow(2, query, queries); }
  at::Tensor of_keys(const at::Tensor& x) const { return x.narrow(2, key, keys); }
};

// What is left to compute of a region; none where no query shares a document with any key.
std::optional<BlockPair> block_pair(const SequenceAttention& a, const Block& block, const Region& region) {
  BlockPair pair{
      region.of_queries(a.q), region.of_keys(block.kv.k), region.of_keys(block.kv.v), region.causal, {}, a.scale};
  if (!a.document_ids.has_value()) return pair;
  at::Tensor keep = a.document_ids->narrow(1, region.query, region.queries)
                        .unsqueeze(2)
                        .eq(block.document_ids.narrow(1, region.key, region.keys).unsqueeze(1));
  // Both answers are read on the host, which must not wait for a GPU; there the mask is always used.
  if (keep.is_cpu()) {
    if (!keep.any().item<bool>()) return std::nullopt;
    if (keep.all().item<bool>()) return pair;
  }
  pair.keep = region.causal ? keep.tril_() : keep;
  return pair;
}

// Every rank must call with the same; a rank that does not would leave the others to hang or to read rubbish.
void check_ring(const SequenceAttention& a, const Peers& peers) {
  peers.agree(
      {a.q.size(0), a.q.size(1), a.k.size(1), a.q.size(2), a.q.size(3), a.v.size(3),
       static_cast<int64_t>(a.q.scalar_type()), a.causal, a.document_ids.has_value(), std::bit_cast<int64_t>(a.scale)},
      "B, N, K, t, H, V, dtype, is_causal, documents, bits of scale");
}

// -> out in q's dtype, logsumexp [B, N, t]
std::tuple<at::Tensor, at::Tensor> ring_forward(const SequenceAttention& a, const std::string& group) {
  const Peers peers(a.op, group, a.q.device());
  check_ring(a, peers);
  at::Tensor out, logsumexp;
  Ring ring(peers, a);
  do {
    const Region region = Region::of(a, peers.rank(), ring.owner());
    const auto pair = block_pair(a, ring.block(), region);
    if (!pair) continue;
    auto [part, part_logsumexp] = block_forward(*pair);
    if (ring.step() == 0) {
      // A query sees itself, so after the own block no logsumexp is -inf.
      out = part.to(at::toOpMathType(part.scalar_type()));
      logsumexp = part_logsumexp.contiguous();
    } else {
      merge_blocks(region.of_queries(out), region.of_queries(logsumexp), part, part_logsumexp);
    }
  } while (ring.next());
  return {out.to(a.q.scalar_type()), logsumexp};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> ring_backward(const SequenceAttention& a, const std::string& group,
                                                             const at::Tensor& grad_out, const at::Tensor& out,
                                                             const at::Tensor& logsumexp) {
  const Peers peers(a.op, group, a.q.device());
  const auto wide = at::toOpMathType(a.q.scalar_type());
  at::Tensor dq = at::zeros(a.q.sizes(), a.q.options().dtype(wide));
  KeyValue sent, incoming;  // sums of an earlier block on their way out, of this one on their way in
  Transfers transfers;
  Ring ring(peers, a);
  do {
    const Region region = Region::of(a, peers.rank(), ring.owner());
    KeyValue sums(a, wide);
    sums.buffer.zero_();
    if (const auto pair = block_pair(a, ring.block(), region)) {
      const auto [dq_part, dk, dv] =
          block_backward(*pair, region.of_queries(grad_out), region.of_queries(out), region.of_queries(logsumexp));
      region.of_queries(dq).add_(dq_part);
      region.of_keys(sums.k).copy_(dk);
      region.of_keys(sums.v).copy_(dv);
    }
    if (ring.step() > 0) {
      transfers.wait();
      sums.buffer.add_(incoming.buffer);
    }
    std::swap(sent, sums);
    if (!incoming.buffer.defined()) incoming = KeyValue(a, wide);
    transfers = peers.shift(sent.buffer, incoming.buffer, kGradientTag);
  } while (ring.next());
  transfers.wait();
  const auto dtype = a.q.scalar_type();
  // Copies, not views of the buffer: each gradient may be kept and freed by itself.
  return {dq.to(dtype), incoming.k.to(dtype, false, true), incoming.v.to(dtype, false, true)};
}

struct RingAttention : public torch::autograd::Function<RingAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& q, const at::Tensor& k,
                            const at::Tensor& v, const std::optional<at::Tensor>& document_ids, bool is_causal,
                            double scale, const std::string& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, logsumexp] = ring_forward({kName, q, k, v, document_ids, is_causal, scale}, group);
    context->save_for_backward({q, k, v, document_ids.value_or(at::Tensor()), out, logsumexp});
    context->saved_data["is_causal"] = is_causal;
    context->saved_data["scale"] = scale;
    context->saved_data["group"] = group;
    return out;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    refuse_double_backward(kName, kOverRanks);
    const auto saved = context->get_saved_variables();
    const std::optional<at::Tensor> document_ids = saved[3].defined() ? std::optional(saved[3]) : std::nullopt;
    const SequenceAttention a{kName,
                              saved[0],
                              saved[1],
                              saved[2],
                              document_ids,
                              context->saved_data["is_causal"].toBool(),
                              context->saved_data["scale"].toDouble()};
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [dq, dk, dv] =
        ring_backward(a, context->saved_data["group"].toStringRef(), grads[0], saved[4], saved[5]);
    return {dq, dk, dv, {}, {}, {}, {}};
  }
  static constexpr const char* kName = "ring_attention";
};

at::Tensor ring_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const std::optional<at::Tensor>& document_ids, bool is_causal, std::optional<double> scale,
                          std::string_view group_name, double dropout_p) {
  constexpr const char* op = RingAttention::kName;
  const auto a = check_sequence_attention(op, q, k, v, document_ids, is_causal, scale, dropout_p);
  const std::string group(group_name);
  if (Peers(op, group, q.device()).ranks() == 1) return whole_attention(a);
  TORCH_CHECK(!is_causal || q.size(2) % 2 == 0, "[stroma::", op,
              "] expected an even number of tokens on each rank (two chunks of the zigzag), got ", q.size(2),
              ": pad the sequence to a multiple of twice the ranks");
  return RingAttention::apply(q, k, v, a.document_ids, is_causal, a.scale, group);
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CompositeImplicitAutograd, m) { m.impl("ring_attention", ring_attention); }

}  // namespace stroma
