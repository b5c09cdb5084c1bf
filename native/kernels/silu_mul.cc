// stroma::silu_mul: silu(gate) * up, SwiGLU's product (Shazeer, arXiv 2002.05202); silu(gate) is rounded to the dtype
// before up multiplies. One shape and dtype for all.
//
// Overwrites nothing. Autograd lies here, on top of the CPU and CUDA twins, and saves gate and up alone. The CPU twin
// is ATen's own operators in the order of a model that is written in them, and of its autograd, hence with their bits.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "kernels/checks.h"

namespace stroma {
namespace {

using Two = std::tuple<at::Tensor, at::Tensor>;

at::Tensor forward_cpu(const at::Tensor& gate, const at::Tensor& up) {
  check_silu_mul(gate, up);
  return at::silu(gate).mul_(up);
}

// -> dgate, dup
Two backward_cpu(const at::Tensor& dy, const at::Tensor& gate, const at::Tensor& up) {
  check_silu_mul(gate, up);
  at::Tensor dgate = at::silu_backward(dy * up, gate);
  return {dgate, at::silu(gate).mul_(dy)};
}

at::Tensor call_forward(const at::Tensor& gate, const at::Tensor& up) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("stroma::silu_mul_forward", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&)>();
  return op.call(gate, up);
}

struct SiluMul : public torch::autograd::Function<SiluMul> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& gate, const at::Tensor& up) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({gate, up});
    return call_forward(gate, up);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    refuse_double_backward("silu_mul");
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("stroma::silu_mul_backward", "")
                               .typed<Two(const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
    const auto saved = context->get_saved_variables();
    auto [dgate, dup] = op.call(grads[0], saved[0], saved[1]);
    return {dgate, dup};
  }
};

at::Tensor silu_mul(const at::Tensor& gate, const at::Tensor& up) {
  check_silu_mul(gate, up);
  return at::GradMode::is_enabled() ? SiluMul::apply(gate, up) : call_forward(gate, up);
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CPU, m) {
  m.impl("silu_mul_forward", forward_cpu);
  m.impl("silu_mul_backward", backward_cpu);
}
TORCH_LIBRARY_IMPL(stroma, CompositeImplicitAutograd, m) { m.impl("silu_mul", silu_mul); }

}  // namespace stroma
