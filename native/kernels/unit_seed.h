// Gradients of one that a backward on this thread begins with, known by their addresses while this lives: an operator
// at the end of a graph then need not multiply by them, nor ask a card, and wait for it, whether it must.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

namespace stroma {

class UnitSeeds {
 public:
  UnitSeeds();
  ~UnitSeeds();
  UnitSeeds(const UnitSeeds&) = delete;
  UnitSeeds& operator=(const UnitSeeds&) = delete;
  // `one` outlives the backward.
  void add(const at::Tensor& one) { addresses_.push_back(one.const_data_ptr()); }
  static bool holds(const at::Tensor& gradient);

 private:
  std::vector<const void*> addresses_;
  UnitSeeds* before_;
};

}  // namespace stroma
