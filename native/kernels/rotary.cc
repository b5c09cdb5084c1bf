// Rotary positions (Su et al., arXiv 2104.09864).
//
//   stroma::rotary_table  positions int64 [B, T] -> [B, T, H] in `dtype`: H / 2 cosines, then H / 2 sines, of position
//   x
//                         theta^(-2i / H), computed in float32 (float64 for float64). With `factor` and the three after
//                         it, Llama 3.1's stretching of the slow frequencies. No gradient.
//   stroma::rotate        x [B, N, T, H] turned by a table; its backward turns by the negative angle. Saves the table.
//
// Overwrite nothing. The table's CPU twin is ATen's own operators in Hugging Face's order (LlamaRotaryEmbedding), hence
// with its bits; rotate rounds where x cos + rotate_half(x) sin rounds (rotary.h). Results lie as x does.
#include <ATen/Dispatch.h>
#include <ATen/Functions.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <numbers>

#include "kernels/checks.h"
#include "kernels/rotary.h"

namespace stroma {
namespace {

at::Tensor llama3(const at::Tensor& frequency, const RotaryScaling& s) {
  const at::Tensor wavelength = frequency.reciprocal() * (2 * std::numbers::pi);
  const at::Tensor slow = at::where(wavelength > s.low_wavelength(), frequency / s.factor, frequency);
  const at::Tensor smooth = (wavelength.reciprocal() * s.original_max_positions - s.low_freq_factor) /
                            (s.high_freq_factor - s.low_freq_factor);
  const at::Tensor blended = (-smooth + 1) * slow / s.factor + smooth * slow;
  const at::Tensor medium = (wavelength >= s.high_wavelength()).logical_and(wavelength <= s.low_wavelength());
  return at::where(medium, blended, slow);
}

at::Tensor table_cpu(const at::Tensor& positions, int64_t head_dim, double theta, std::optional<double> factor,
                     std::optional<double> low_freq_factor, std::optional<double> high_freq_factor,
                     std::optional<double> original_max_positions, at::ScalarType dtype) {
  check_rotary_table(positions, head_dim, dtype);
  const auto scaling = RotaryScaling::of(factor, low_freq_factor, high_freq_factor, original_max_positions);
  const auto wide = dtype == at::kDouble ? at::kDouble : at::kFloat;
  const at::Tensor even = at::arange(0, head_dim, 2, at::kLong).to(wide);
  at::Tensor frequency = at::pow(theta, even / head_dim).reciprocal();
  if (scaling) frequency = llama3(frequency, *scaling);
  at::Tensor angle = positions.to(wide).unsqueeze(-1) * frequency;
  const int64_t half = head_dim / 2;
  at::Tensor table = at::empty({positions.size(0), positions.size(1), head_dim}, positions.options().dtype(dtype));
  table.narrow(-1, 0, half).copy_(angle.cos());
  table.narrow(-1, half, half).copy_(angle.sin_());
  return table;
}

at::Tensor apply_cpu(const at::Tensor& x_in, const at::Tensor& table_in, bool back) {
  check_rotate(x_in, table_in);
  const at::Tensor x = rows_dense(x_in), table = table_in.contiguous();
  at::Tensor out = at::empty_like(x);
  const int64_t N = x.size(1), T = x.size(2), H = x.size(3), half = H / 2;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "stroma::rotate", [&] {
    using wide = at::opmath_type<scalar_t>;
    const scalar_t* source = x.const_data_ptr<scalar_t>();
    const scalar_t* turns = table.const_data_ptr<scalar_t>();
    scalar_t* target = out.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, N * H));
    at::parallel_for(0, x.size(0) * T, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const scalar_t* __restrict cos = turns + row * H;
        const scalar_t* __restrict sin = cos + half;
        for (int64_t n = 0; n < N; ++n) {
          const int64_t at = row / T * x.stride(0) + n * x.stride(1) + row % T * x.stride(2);
          const scalar_t* __restrict from = source + at;
          scalar_t* __restrict to = target + at;
          for (int64_t i = 0; i < half; ++i) {
            scalar_t low = from[i], high = from[half + i];
            turn<wide>(low, high, cos[i], sin[i], back);
            to[i] = low;
            to[half + i] = high;
          }
        }
      }
    });
  });
  return out;
}

at::Tensor call_apply(const at::Tensor& x, const at::Tensor& table, bool back) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("stroma::rotate_apply", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, bool)>();
  return op.call(x, table, back);
}

struct Rotate : public torch::autograd::Function<Rotate> {
  static at::Tensor forward(torch::autograd::AutogradContext* context, const at::Tensor& x, const at::Tensor& table) {
    at::AutoDispatchBelowADInplaceOrView guard;
    context->save_for_backward({table});
    return call_apply(x, table, false);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                 torch::autograd::variable_list grads) {
    refuse_double_backward("rotate");
    return {call_apply(grads[0], context->get_saved_variables()[0], true), {}};
  }
};

at::Tensor rotate(const at::Tensor& x, const at::Tensor& table) {
  check_rotate(x, table);
  if (!at::GradMode::is_enabled()) return call_apply(x, table, false);
  TORCH_CHECK(!table.requires_grad(), "[stroma::rotate] expected a table without a gradient: it has none");
  return Rotate::apply(x, table);
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CPU, m) {
  m.impl("rotary_table", table_cpu);
  m.impl("rotate_apply", apply_cpu);
}
TORCH_LIBRARY_IMPL(stroma, CompositeImplicitAutograd, m) { m.impl("rotate", rotate); }

}  // namespace stroma
