// stroma::all_to_all_attention. Shapes, layouts and failures: ring_attention.h.
//
// Four exchanges: q, k and v go from (all heads, t tokens) to (N / R heads, all T tokens), libtorch's attention runs on
// them unsplit, and its result goes back. Key/value heads that R does not divide are repeated as often as it takes, at
// most lcm(K, R) / K times; their gradients are added up again over the copies, in the order of heads.
//
// Traffic of a rank, bytes out (and as many in), S = size of an element, K' = lcm(K, R) heads after the repetition:
//   forward   (R - 1) / R B t S (N (H + V) + K' (H + V)), documents: and (R - 1) 8 B t;   backward  the same but
//   documents
// Less than the ring's (R - 1) K (H + V) once R is large against N / K, but none of it hidden behind arithmetic.
// Memory: like the unsplit attention's of N / R heads, which falls as 1 / R; a document mask [B, T, T] does not.
#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <bit>
#include <numeric>

#include "kernels/checks.h"
#include "kernels/ring_attention.h"
#include "kernels/ring_attention_peers.h"

namespace stroma {
namespace {

constexpr const char* kName = "all_to_all_attention";
constexpr int kExchangeTag = 0x5354'0010, kDocumentsTag = 0x5354'0011;

// Part i of `parts` goes to rank i; -> the part that each rank gave this one, in the order of ranks.
std::vector<at::Tensor> exchange(const Peers& peers, std::vector<at::Tensor> parts, int tag) {
  std::vector<at::Tensor> received(parts.size());
  std::vector<Message> sends, receives;
  // Peers at growing distance, so that not all ranks send to the same one first.
  for (int64_t distance = 1; distance < peers.ranks(); ++distance) {
    const int64_t to = (peers.rank() + distance) % peers.ranks();
    const int64_t from = (peers.rank() - distance + peers.ranks()) % peers.ranks();
    received[from] = at::empty(parts[from].sizes(), parts[from].options());
    sends.push_back({parts[to].contiguous(), to, tag});
    receives.push_back({received[from], from, tag});
  }
  auto transfers = peers.post(std::move(sends), std::move(receives));
  received[peers.rank()] = parts[peers.rank()];
  transfers.wait();
  return received;
}

// [B, heads, t, H] -> [B, heads / R, T, H], in the order of the sequence
at::Tensor gather_sequence(const Peers& peers, const at::Tensor& x, bool zigzag) {
  return merge_sequence(exchange(peers, x.chunk(peers.ranks(), 1), kExchangeTag), 2, zigzag);
}

// [B, heads / R, T, H] -> [B, heads, t, H]: the way back
at::Tensor gather_heads(const Peers& peers, const at::Tensor& x, bool zigzag) {
  std::vector<at::Tensor> shares;
  for (int64_t r = 0; r < peers.ranks(); ++r) shares.push_back(split_sequence(x, 2, r, peers.ranks(), zigzag));
  return at::cat(exchange(peers, std::move(shares), kExchangeTag), 1);
}

// Either way; the other one is its derivative.
struct Exchange : public torch::autograd::Function<Exchange> {
  static at::Tensor run(const at::Tensor& x, bool to_sequence, bool zigzag, const std::string& group) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const Peers peers(kName, group, x.device());
    return to_sequence ? gather_sequence(peers, x, zigzag) : gather_heads(peers, x, zigzag);
  }
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, bool to_sequence,
                            bool zigzag, const std::string& group) {
    context->saved_data["to_sequence"] = to_sequence;
    context->saved_data["zigzag"] = zigzag;
    context->saved_data["group"] = group;
    return run(x, to_sequence, zigzag, group);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    refuse_double_backward(kName, kOverRanks);
    auto& saved = context->saved_data;
    return {run(grads[0], !saved["to_sequence"].toBool(), saved["zigzag"].toBool(), saved["group"].toStringRef()),
            {},
            {},
            {}};
  }
};

at::Tensor all_to_all_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const std::optional<at::Tensor>& document_ids, bool is_causal,
                                std::optional<double> scale, std::string_view group_name, double dropout_p) {
  auto a = check_sequence_attention(kName, q, k, v, document_ids, is_causal, scale, dropout_p);
  const std::string group(group_name);
  const Peers peers(kName, group, q.device());
  const int64_t ranks = peers.ranks(), heads = q.size(1), kv_heads = k.size(1);
  if (ranks == 1) return whole_attention(a);
  TORCH_CHECK(heads % ranks == 0, "[stroma::", kName, "] expected query heads to be a multiple of the ranks, got ",
              heads, " heads on ", ranks, " ranks: use ring_attention");
  TORCH_CHECK(!is_causal || q.size(2) % 2 == 0, "[stroma::", kName,
              "] expected an even number of tokens on each rank (two chunks of the zigzag), got ", q.size(2),
              ": pad the sequence to a multiple of twice the ranks");
  peers.agree({q.size(0), heads, kv_heads, q.size(2), q.size(3), v.size(3), static_cast<int64_t>(q.scalar_type()),
               is_causal, a.document_ids.has_value(), std::bit_cast<int64_t>(a.scale)},
              "B, N, K, t, H, V, dtype, is_causal, documents, bits of scale");
  const int64_t copies = std::lcm(kv_heads, ranks) / kv_heads;
  const auto repeated = [&](const at::Tensor& x) { return copies == 1 ? x : x.repeat_interleave(copies, 1); };
  const auto to_sequence = [&](const at::Tensor& x) { return Exchange::apply(x, true, is_causal, group); };
  a.q = to_sequence(q);
  a.k = to_sequence(repeated(k));
  a.v = to_sequence(repeated(v));
  if (a.document_ids.has_value()) {
    // Every rank gets all of them.
    const std::vector<at::Tensor> own(ranks, *a.document_ids);
    a.document_ids = merge_sequence(exchange(peers, own, kDocumentsTag), 1, is_causal);
  }
  // On CPU in fp32, as a pair of the ring: gradients of repeated heads are summed after each was rounded.
  const auto dtype = q.scalar_type();
  if (q.is_cpu()) {
    const auto wide = at::toOpMathType(dtype);
    a.q = a.q.to(wide);
    a.k = a.k.to(wide);
    a.v = a.v.to(wide);
  }
  return Exchange::apply(whole_attention(a).to(dtype), false, is_causal, group);
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CompositeImplicitAutograd, m) { m.impl("all_to_all_attention", all_to_all_attention); }

}  // namespace stroma
