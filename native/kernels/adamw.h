// AdamW for one element (Loshchilov & Hutter, arXiv 1711.05101, algorithm 2 with decoupled decay before the step).
//
// Order of operations and rounding are those of torch.optim.AdamW(foreach=False), so that parameters and moments come
// out equal to the bit: lerp_ and addcmul_ fuse their last multiply-add on vectorised CPUs, addcdiv_ does not. The
// square root stands between the two halves because it is no common ground: PyTorch's CPU root is MKL's, which is not
// correctly rounded (measured: 16 % of fp32 roots differ in the last bit), so the CPU twin calls that one.
#pragma once
#include "kernels/hd.h"

namespace stroma {

// What is the same for all elements of a launch, computed once in double as PyTorch's Python does.
template <typename T>
struct AdamWStep {
  T decay;            // 1 - lr * weight_decay
  T one_minus_beta1;  // weight of the new gradient in exp_avg
  T beta2;
  T one_minus_beta2;
  T sqrt_correction2;  // sqrt(1 - beta2^t)
  T inverse_sqrt_correction2;
  T epsilon;
  T negative_step_size;  // -lr / (1 - beta1^t)
  T gradient_scale;      // clip coefficient; multiplied even when 1
  bool decays;           // weight_decay != 0

  static AdamWStep make(double lr, double beta1, double beta2, double epsilon, double weight_decay, int64_t step,
                        double gradient_scale) {
    const double correction1 = 1.0 - std::pow(beta1, static_cast<double>(step));
    const double correction2 = 1.0 - std::pow(beta2, static_cast<double>(step));
    AdamWStep s;
    s.decay = static_cast<T>(1.0 - lr * weight_decay);
    s.one_minus_beta1 = static_cast<T>(1.0 - beta1);
    s.beta2 = static_cast<T>(beta2);
    s.one_minus_beta2 = static_cast<T>(1.0 - beta2);
    s.sqrt_correction2 = static_cast<T>(std::sqrt(correction2));
    s.inverse_sqrt_correction2 = static_cast<T>(1.0 / std::sqrt(correction2));
    s.epsilon = static_cast<T>(epsilon);
    s.negative_step_size = static_cast<T>(-(lr / correction1));
    s.gradient_scale = static_cast<T>(gradient_scale);
    s.decays = weight_decay != 0;
    return s;
  }
  STROMA_HD bool from_moment() const { return one_minus_beta1 < static_cast<T>(0.5); }
};

// First half: both moments from the summed gradient; returns the operand of the root. ATen's lerp changes its form
// where the weight reaches one half: FromMoment is the one below, the same for all elements (s.from_moment()).
template <bool FromMoment, typename T>
STROMA_HD T adamw_moments(const AdamWStep<T>& s, T g, T& m, T& v) {
  g = g * s.gradient_scale;
  m = FromMoment ? fused_multiply_add(s.one_minus_beta1, g - m, m)
                 : fused_multiply_add(s.one_minus_beta1 - static_cast<T>(1), g - m, g);
  v = fused_multiply_add(s.one_minus_beta2 * g, g, v * s.beta2);
  return v;
}
// The same, the form chosen without a branch.
template <typename T>
STROMA_HD T adamw_moments(const AdamWStep<T>& s, T g, T& m, T& v) {
  const bool from_moment = s.from_moment();
  g = g * s.gradient_scale;
  m = fused_multiply_add(from_moment ? s.one_minus_beta1 : s.one_minus_beta1 - static_cast<T>(1), g - m,
                         from_moment ? m : g);
  v = fused_multiply_add(s.one_minus_beta2 * g, g, v * s.beta2);
  return v;
}

// Second half: the parameter, from the new first moment and the root of the new second one.
template <typename T>
STROMA_HD T adamw_parameter(const AdamWStep<T>& s, T p, T m, T root_of_v) {
  if (s.decays) p = p * s.decay;
  return p + (s.negative_step_size * m) / (root_of_v / s.sqrt_correction2 + s.epsilon);
}

// Quantized moments (Dettmers et al., arXiv 2110.02861): the same step, on moments that were decoded and whose new
// values are encoded only afterwards. An element whose new second moment is not finite (its gradient is NaN, infinite,
// or its square overflows) loses its state and keeps its parameter, or one such value would take its whole block along.
// No bits of PyTorch's are to be met here: the root is the correctly rounded one, and its correction a product.
STROMA_HD void adamw_quantized_weight(const AdamWStep<float>& s, float& p, float& m, float& v) {
  const float root = square_root(v);
  const float denominator = fused_multiply_add(root, s.inverse_sqrt_correction2, s.epsilon);
  const float updated = p * s.decay + (s.negative_step_size * m) / denominator;  // a decay of 1 changes nothing
  const bool finite = v < __builtin_huge_valf();
  p = finite ? updated : p;
  m = finite ? m : 0.0f;
  v = finite ? v : 0.0f;
}
template <bool FromMoment>
STROMA_HD void adamw_quantized(const AdamWStep<float>& s, float g, float& p, float& m, float& v) {
  adamw_moments(s, g, m, v);
  adamw_quantized_weight(s, p, m, v);
}

}  // namespace stroma
