// One door to every operator: by name through c10::Dispatcher, boxed, by the live schema.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>
#include <napi.h>

#include <string>
#include <vector>

#include "binding/convert.h"

namespace stroma {

/// An overload with its schema taken apart; made on first use, kept for the environment's life.
struct Op {
  explicit Op(c10::OperatorHandle handle);
  c10::OperatorHandle handle;
  std::string name;  // "aten::add.Tensor"
  std::vector<ArgSpec> args;
  /// Real types of the returns, for values that are stored as int (dtypes).
  std::vector<c10::TypePtr> returns;
  /// A return may be one of the arguments (in-place and out= forms).
  bool returns_argument = false;
  bool single_tensor = false;
  /// See refused.cc.
  bool trusting = false;
  bool copies = false;
  bool polynomial = false;
  bool foreach = false;
  bool range = false;
};

/// Throws CodedError UNKNOWN_OPERATOR, naming near misses of the same base name.
uint32_t find_op(TensorDoor& door, const std::string& name);

/// Reads `values` arguments from the words, calls, writes the results. Returns the words needed (see write_results).
size_t call_op(TensorDoor& door, uint32_t id, uint32_t values);

/// Runs an operator on a stack of boxed arguments, with the operator's name in whatever it throws.
void run_boxed(const Op& op, std::vector<c10::IValue>& stack);

void export_dispatch(Napi::Env env, Napi::Object exports);

}  // namespace stroma
