// Arithmetic of SwiGLU's product on a card, as ATen's CUDA operators do it: every result rounded to T.
#pragma once
#include "kernels/hd.h"

namespace stroma {

STROMA_HD float exponential(float x) { return expf(x); }
STROMA_HD double exponential(double x) { return exp(x); }

template <typename Wide, typename T>
STROMA_HD T silu(T gate) {
  const Wide g = static_cast<Wide>(gate);
  return static_cast<T>(g / (Wide(1) + exponential(-g)));
}

template <typename Wide, typename T>
STROMA_HD T silu_mul(T gate, T up) {
  return static_cast<T>(static_cast<Wide>(silu<Wide>(gate)) * static_cast<Wide>(up));
}

template <typename Wide, typename T>
STROMA_HD void silu_mul_gradients(T dy, T gate, T up, T& dgate, T& dup) {
  const Wide g = static_cast<Wide>(gate), d = static_cast<Wide>(dy);
  const Wide ds = static_cast<Wide>(static_cast<T>(d * static_cast<Wide>(up)));
  const Wide sigmoid = Wide(1) / (Wide(1) + exponential(-g));
  dup = static_cast<T>(d * static_cast<Wide>(silu<Wide>(gate)));
  dgate = static_cast<T>(ds * sigmoid * (Wide(1) + g * (Wide(1) - sigmoid)));
}

}  // namespace stroma
