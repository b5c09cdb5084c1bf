#include "binding/refused.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <optional>
#include <string_view>

#include "binding/dispatch.h"

namespace stroma {

namespace {
// Operators whose kernels trust their caller: with arguments that did not come from their own forward or their own
// composite they read or write outside their tensors, divide by zero or recurse without end. Found by the fuzz test
// (tests/native/fuzz); base names, so all overloads. Every *_backward is one by construction.
constexpr std::string_view kTrusting[] = {
#include "binding/trusting.inc"
};

bool is_trusting(std::string_view space, std::string_view base) {
  if (base.find("_backward") != std::string_view::npos) return true;
  // Packers of weights, and the fused forms of compilers: they take the shapes that their own front end has checked.
  for (const std::string_view inner : {"_quantized", "onednn", "mkl", "mkldnn", "mkldnn_prepacked", "static_runtime"}) {
    if (space == inner) return true;
  }
  if (base.rfind("fbgemm_", 0) == 0) return true;
  return std::find(std::begin(kTrusting), std::end(kTrusting), base) != std::end(kTrusting);
}

[[noreturn]] void refuse(const Op& op, const std::string& why) {
  throw CodedError("INVALID_ARGUMENT", "[" + op.name + "] " + why,
                   {{"op", op.name}, {"refused", std::string("unsafe")}});
}

/// The recurrences run n times an element: a degree of 2^40 would run for hours.
void check_degree(const Op& op, const c10::IValue& degree) {
  constexpr double kLargest = 1e6;
  double largest = 0;
  if (degree.isTensor()) {
    const at::Tensor n = degree.toTensor();
    if (!n.defined() || !n.device().is_cpu() || n.numel() == 0 || n.is_complex() || n.layout() != at::kStrided) return;
    const at::Tensor bounds = n.detach().to(at::kDouble).abs();
    const at::Tensor dense = bounds.contiguous();
    const double* values = dense.const_data_ptr<double>();
    for (int64_t i = 0; i < dense.numel(); ++i) largest = std::max(largest, values[i]);
  } else if (degree.isScalar()) {
    const c10::Scalar n = degree.toScalar();
    if (!n.isComplex()) largest = std::abs(n.toDouble());
  }
  if (largest > kLargest) refuse(op, "expected a degree n of at most 1000000, got one that would run for hours");
}
/// One list's length bounds the loops over all of them.
void check_lists(const Op& op, const std::vector<c10::IValue>& stack) {
  std::optional<size_t> length;
  for (const auto& value : stack) {
    if (!value.isList()) continue;
    const size_t n = value.toListRef().size();
    if (length.has_value() && n != *length) {
      refuse(op, "expected lists of one length, got " + std::to_string(*length) + " and " + std::to_string(n));
    }
    length = n;
  }
}

/// The kernel looks for a storage behind what it would copy to, and a compressed sparse tensor has none.
void check_strided(const Op& op, const c10::IValue& self) {
  if (!self.isTensor() || !self.toTensor().defined() || self.toTensor().layout() == at::kStrided) return;
  refuse(op, "expected a strided tensor to copy to, got a sparse one. Call aten::copy_ for those");
}

/// A step of 0.5 is 0 in an integer range, and the kernel divides by it.
void check_step(const Op& op, const std::vector<c10::IValue>& stack) {
  bool whole = false;
  double step = 1;
  for (size_t i = 0; i < stack.size(); ++i) {
    const std::string& name = op.args[i].name;
    const c10::IValue& value = stack[i];
    if (name == "step" && value.isScalar() && !value.toScalar().isComplex()) step = value.toScalar().toDouble();
    if (name == "out" && value.isTensor() && value.toTensor().defined()) {
      whole = c10::isIntegralType(value.toTensor().scalar_type(), true);
    }
    if (name == "dtype" && value.isInt()) whole = c10::isIntegralType(value.toScalarType(), true);
  }
  if (whole && std::abs(step) < 1) refuse(op, "expected a step of 1 or more for whole numbers");
}
}  // namespace

void examine(Op& op) {
  const std::string_view name = op.name;
  const size_t colons = name.find("::");
  if (colons == std::string_view::npos) return;
  std::string_view base = name.substr(colons + 2);
  base = base.substr(0, base.find('.'));
  op.trusting = is_trusting(name.substr(0, colons), base);
  op.foreach = base.rfind("_foreach_", 0) == 0;
  op.range = base == "range";
  op.copies = base == "copy";
  op.polynomial = base.find("_polynomial_") != std::string_view::npos;
}

void refuse_unsafe(const Op& op, const std::vector<c10::IValue>& stack, bool trusted) {
  if (op.trusting && !trusted) {
    refuse(op,
           "this operator's kernel trusts its arguments and can end the process on wrong ones. Call it inside "
           "trusted(() => ...) if they are known to be right");
  }
  if (op.foreach) check_lists(op, stack);
  if (op.range) check_step(op, stack);
  if (op.copies && !stack.empty()) check_strided(op, stack[0]);
  if (op.polynomial && stack.size() > 1) check_degree(op, stack[1]);
}

}  // namespace stroma
