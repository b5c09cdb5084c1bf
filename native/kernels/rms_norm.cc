// stroma::rms_norm: y = weight * narrow(wide(x) * r), r = 1 / sqrt(mean(wide(x)^2) + eps) over the last dim (Zhang and
// Sennrich, arXiv 1910.07467). x [..., D], weight [D], r [..., 1]; wide is float32 (float64 for float64), and narrow
// rounds to x's dtype before the weight multiplies, as Hugging Face does.
//
// Overwrites nothing. Autograd lies here, on top of the CPU and CUDA twins, and saves x, weight and r. The CPU twin is
// ATen's own operators in the order of a model that is written in them, and of its autograd, hence with their bits. To
// that belongs that x's gradient has two parts (through r, and past it). Where x is as wide as what computes, autograd
// adds first the one and then the other to what else comes to x: so the operator takes x twice, and hands out both.
#include <ATen/ExpandUtils.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels/checks.h"

namespace stroma {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;
using Three = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// -> y, r
Two forward_cpu(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_rms_norm(x, weight);
  const at::Tensor wide = x.to(wide_type(x));
  const at::Tensor r = wide.pow(2).mean(-1, true).add_(eps).rsqrt_();
  const at::Tensor normed = wide.is_same(x) ? wide * r : wide.mul_(r);
  return {normed.to(x.scalar_type()).mul_(weight), r};
}

// -> dx, more of it or undefined, dweight; undefined where not needed
Three backward_cpu(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& r,
                   bool need_x, bool need_weight) {
  check_rms_norm(x, weight);
  const auto type = x.scalar_type();
  at::Tensor wide = x.to(wide_type(x));
  at::Tensor dx, more, dweight;
  if (need_weight) dweight = at::sum_to(dy * (wide * r).to(type), weight.sizes());
  if (need_x) {
    dx = (dy * weight).to(wide.scalar_type());
    const at::Tensor dr = (dx * wide).sum(-1, true);
    const at::Tensor dmean = dr.mul_(-0.5).mul_(r.pow(3)).div_(x.size(-1));
    dx.mul_(r);
    if (wide.is_same(x))
      more = (wide * 2).mul_(dmean);
    else
      dx = dx.add_(wide.mul_(2).mul_(dmean)).to(type);
  }
  return {dx, more, dweight};
}

Two call_forward(const at::Tensor& x, const at::Tensor& weight, double eps) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("stroma::rms_norm_forward", "")
                             .typed<Two(const at::Tensor&, const at::Tensor&, double)>();
  return op.call(x, weight, eps);
}

struct RmsNorm : public torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x,
                            const at::Tensor& /* again */, const at::Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView guard;
    auto [y, r] = call_forward(x, weight, eps);
    context->save_for_backward({x, weight, r});
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    refuse_double_backward("rms_norm");
    static const auto op =
        c10::Dispatcher::singleton()
            .findSchemaOrThrow("stroma::rms_norm_backward", "")
            .typed<Three(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, bool, bool)>();
    const auto saved = context->get_saved_variables();
    auto [dx, more, dweight] =
        op.call(grads[0], saved[0], saved[1], saved[2], context->needs_input_grad(0), context->needs_input_grad(2));
    return {dx, more, dweight, {}};
  }
};

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_rms_norm(x, weight);
  if (!at::GradMode::is_enabled()) return std::get<0>(call_forward(x, weight, eps));
  return RmsNorm::apply(x, x, weight, eps);
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CPU, m) {
  m.impl("rms_norm_forward", forward_cpu);
  m.impl("rms_norm_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(stroma, CompositeImplicitAutograd, m) { m.impl("rms_norm", rms_norm); }

}  // namespace stroma
