// Arithmetic of rotary positions that the CPU and CUDA twins share (Su et al., arXiv 2104.09864). The halves of a head
// pair up as in Hugging Face (GPT-NeoX order): element i turns with element H / 2 + i.
#pragma once
#include <optional>

#include "kernels/hd.h"

namespace stroma {

// Llama 3.1's stretching of the slow frequencies (Hugging Face: rope_type "llama3").
struct RotaryScaling {
  double factor, low_freq_factor, high_freq_factor, original_max_positions;

  double low_wavelength() const { return original_max_positions / low_freq_factor; }
  double high_wavelength() const { return original_max_positions / high_freq_factor; }
  // All four, or none.
  static std::optional<RotaryScaling> of(std::optional<double> factor, std::optional<double> low,
                                         std::optional<double> high, std::optional<double> original) {
    if (!factor || !low || !high || !original) return std::nullopt;
    return RotaryScaling{*factor, *low, *high, *original};
  }
};

// Every product is rounded to T, then their sum, as where each is an operator of its own. `Wide` computes.
template <typename Wide, typename T>
STROMA_HD void turn(T& low, T& high, T cos, T sin, bool back) {
  const Wide c = static_cast<Wide>(cos), s = back ? -static_cast<Wide>(sin) : static_cast<Wide>(sin);
  const Wide l = static_cast<Wide>(low), h = static_cast<Wide>(high);
  const T low_c = static_cast<T>(l * c), high_s = static_cast<T>(-h * s);
  const T high_c = static_cast<T>(h * c), low_s = static_cast<T>(l * s);
  low = static_cast<T>(static_cast<Wide>(low_c) + static_cast<Wide>(high_s));
  high = static_cast<T>(static_cast<Wide>(high_c) + static_cast<Wide>(low_s));
}

STROMA_HD float power(float x, float y) { return powf(x, y); }
STROMA_HD double power(double x, double y) { return pow(x, y); }
STROMA_HD float cosine(float x) { return cosf(x); }
STROMA_HD double cosine(double x) { return cos(x); }
STROMA_HD float sine(float x) { return sinf(x); }
STROMA_HD double sine(double x) { return sin(x); }

// theta^(-2i / H), stretched where there is a scaling; in the order of Hugging Face's operators, as the CPU twin.
template <typename Wide>
struct RotaryFrequencies {
  Wide theta, head_dim;
  bool scaled;
  Wide factor, low, span, original, low_wavelength, high_wavelength;

  RotaryFrequencies(double theta, int64_t head_dim, const std::optional<RotaryScaling>& s)
      : theta(static_cast<Wide>(theta)), head_dim(static_cast<Wide>(head_dim)), scaled(s.has_value()) {
    const RotaryScaling of = s.value_or(RotaryScaling{1, 1, 2, 1});
    factor = static_cast<Wide>(of.factor);
    low = static_cast<Wide>(of.low_freq_factor);
    span = static_cast<Wide>(of.high_freq_factor - of.low_freq_factor);
    original = static_cast<Wide>(of.original_max_positions);
    low_wavelength = static_cast<Wide>(of.low_wavelength());
    high_wavelength = static_cast<Wide>(of.high_wavelength());
  }
  STROMA_HD Wide at(int64_t i) const {
    const Wide plain = Wide(1) / power(theta, static_cast<Wide>(2 * i) / head_dim);
    if (!scaled) return plain;
    const Wide wavelength = Wide(1) / plain * static_cast<Wide>(6.283185307179586);
    const Wide slow = wavelength > low_wavelength ? plain / factor : plain;
    if (wavelength < high_wavelength || wavelength > low_wavelength) return slow;
    const Wide smooth = (Wide(1) / wavelength * original - low) / span;
    return (Wide(1) - smooth) * slow / factor + smooth * slow;
  }
};

}  // namespace stroma
