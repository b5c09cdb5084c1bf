// stroma::cross_entropy_head: sum of cross entropies of x W^T + b against labels, times `scale`, over chunks of rows,
// so that the full [N, V] logits never exist. Built of ATen ops, hence one implementation for every device.
//
// Overwrites nothing. The forward already computes the gradients when they are wanted (the scale is known, the loss is
// the end of the graph): logits of a chunk are used for both, never recomputed. Chunks are computed and their weight
// gradients added last first, as autograd does for a loop over chunks (newest first), so the result is equal to the bit
// to that loop in stock PyTorch; the losses are added first to last. Of a bfloat16 or half weight (and bias) the
// chunks' gradients are added in float32 and rounded once, where that loop rounds each of its sums.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/unit_seed.h"

namespace stroma {

namespace {
thread_local UnitSeeds* seeds_here = nullptr;
}
UnitSeeds::UnitSeeds() : before_(seeds_here) { seeds_here = this; }
UnitSeeds::~UnitSeeds() { seeds_here = before_; }
bool UnitSeeds::holds(const at::Tensor& gradient) {
  if (seeds_here == nullptr) return false;
  const auto& known = seeds_here->addresses_;
  return std::find(known.begin(), known.end(), gradient.const_data_ptr()) != known.end();
}

namespace {

struct HeadResult {
  at::Tensor loss, dx, dweight, dbias;
};

// Adds into the running sum of `type`, or becomes it. A narrower term is widened as it is added, never beside the sum.
void accumulate(at::Tensor& sum, at::Tensor term, at::ScalarType type) {
  if (sum.defined())
    sum.add_(term);
  else
    sum = term.to(type);
}

HeadResult head(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                const at::Tensor& labels, const at::Tensor& scale, int64_t chunk, int64_t ignore_index, bool need_x,
                bool need_weight, bool need_bias) {
  const int64_t rows = x.size(0);
  const int64_t chunks = std::max<int64_t>(1, (rows + chunk - 1) / chunk);
  const bool need_any = need_x || need_weight || need_bias;
  const bool narrow = weight.scalar_type() == at::kBFloat16 || weight.scalar_type() == at::kHalf;
  const auto sum_type = narrow && chunks > 1 ? at::kFloat : weight.scalar_type();
  HeadResult result;
  std::vector<at::Tensor> losses(chunks), dx(chunks);
  const std::optional<at::Tensor> no_weight;
  for (int64_t c = chunks - 1; c >= 0; --c) {
    const int64_t begin = c * chunk, end = std::min(rows, begin + chunk);
    const at::Tensor x_c = x.slice(0, begin, end), labels_c = labels.slice(0, begin, end);
    at::Tensor logits = at::linear(x_c, weight, bias);
    // Softmax and loss in at least fp32.
    const bool widen = logits.scalar_type() == at::kBFloat16 || logits.scalar_type() == at::kHalf;
    at::Tensor log_probs = at::log_softmax(widen ? logits.to(at::kFloat) : logits, 1);
    logits.reset();
    auto [nll, total] = at::nll_loss_forward(log_probs, labels_c, no_weight, at::Reduction::Sum, ignore_index);
    losses[c] = nll * scale;
    if (!need_any) continue;
    at::Tensor dlogits = at::nll_loss_backward(scale.to(log_probs.scalar_type()), log_probs, labels_c, no_weight,
                                               at::Reduction::Sum, ignore_index, total);
    dlogits = at::_log_softmax_backward_data(dlogits, log_probs, 1, log_probs.scalar_type());
    log_probs.reset();
    if (widen) dlogits = dlogits.to(x.scalar_type());
    if (need_x) dx[c] = dlogits.mm(weight);
    if (need_weight) accumulate(result.dweight, dlogits.t().mm(x_c), sum_type);
    if (need_bias) accumulate(result.dbias, dlogits.sum({0}, false, sum_type), sum_type);
  }
  result.loss = losses[0];
  for (int64_t c = 1; c < chunks; ++c) result.loss = result.loss + losses[c];
  if (need_weight) result.dweight = result.dweight.to(weight.scalar_type());
  if (need_bias) result.dbias = result.dbias.to(weight.scalar_type());
  if (need_x) result.dx = chunks == 1 ? dx[0] : at::cat(dx, 0);
  return result;
}

struct CrossEntropyHead : public torch::autograd::Function<CrossEntropyHead> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& weight,
                            const std::optional<at::Tensor>& bias, const at::Tensor& labels, const at::Tensor& scale,
                            int64_t chunk, int64_t ignore_index) {
    const bool need_bias = bias.has_value() && bias->defined() && bias->requires_grad();
    at::AutoDispatchBelowADInplaceOrView guard;
    const HeadResult result =
        head(x, weight, bias, labels, scale, chunk, ignore_index, x.requires_grad(), weight.requires_grad(), need_bias);
    context->saved_data["dx"] = result.dx;
    context->saved_data["dweight"] = result.dweight;
    context->saved_data["dbias"] = result.dbias;
    return result.loss;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    const at::Tensor& upstream = grads[0];
    // Training seeds one: then nothing is multiplied.
    const bool one = UnitSeeds::holds(upstream) || upstream.item<double>() == 1.0;
    TORCH_CHECK(
        !context->saved_data.empty(),
        "[stroma::cross_entropy_head] its gradients were handed over by an earlier backward: run the head again");
    const auto saved = std::move(context->saved_data);
    context->saved_data.clear();
    // Handed over, not shared: the weight's is as large as the weight, and whoever holds it alone need not copy it.
    const auto gradient = [&](const char* name) {
      const at::Tensor g = saved.at(name).toTensor();
      return !g.defined() || one ? g : g * upstream.to(g.scalar_type());
    };
    return {gradient("dx"), gradient("dweight"), gradient("dbias"), {}, {}, {}, {}};
  }
};

at::Tensor cross_entropy_head(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                              const at::Tensor& labels, const at::Tensor& scale, int64_t chunk, int64_t ignore_index) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
              "[stroma::cross_entropy_head] expected x [N, D] and weight [V, D], got ", x.sizes(), " and ",
              weight.sizes());
  TORCH_CHECK(labels.dim() == 1 && labels.size(0) == x.size(0) && labels.scalar_type() == at::kLong,
              "[stroma::cross_entropy_head] expected labels int64 [", x.size(0), "], got ", labels.scalar_type(), " ",
              labels.sizes());
  TORCH_CHECK(scale.numel() == 1, "[stroma::cross_entropy_head] expected a scalar scale, got ", scale.sizes());
  TORCH_CHECK(chunk > 0, "[stroma::cross_entropy_head] expected chunk > 0, got ", chunk);
  if (at::GradMode::is_enabled()) return CrossEntropyHead::apply(x, weight, bias, labels, scale, chunk, ignore_index);
  return head(x, weight, bias, labels, scale, chunk, ignore_index, false, false, false).loss;
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CompositeImplicitAutograd, m) { m.impl("cross_entropy_head", cross_entropy_head); }

}  // namespace stroma
