// Arithmetic of RMSNorm on a card: rounded to T where a model of operators rounds, sums in `Wide`.
#pragma once
#include "kernels/hd.h"

namespace stroma {

template <typename Wide>
STROMA_HD Wide reciprocal_root(Wide sum_of_squares, int64_t width, Wide eps) {
  return Wide(1) / square_root(sum_of_squares / static_cast<Wide>(width) + eps);
}

template <typename Wide, typename T>
STROMA_HD T normed(T x, Wide r) {
  return static_cast<T>(static_cast<Wide>(x) * r);
}

template <typename Wide, typename T>
STROMA_HD T product(T a, T b) {
  return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b));
}

// d loss / d mean of squares, from the row's sum of dy weight x.
template <typename Wide>
STROMA_HD Wide mean_gradient(Wide sum, Wide r, int64_t width) {
  return Wide(-0.5) * sum * (r * r * r) / static_cast<Wide>(width);
}

template <typename Wide, typename T>
STROMA_HD T input_gradient(T dy, T weight, T x, Wide r, Wide dmean) {
  const Wide g = static_cast<Wide>(product<Wide>(dy, weight));
  return static_cast<T>(g * r + static_cast<Wide>(x) * Wide(2) * dmean);
}

}  // namespace stroma
