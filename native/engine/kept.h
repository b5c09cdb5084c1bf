// Recompute "selective": what a block's forward keeps of its dear operators, and how its backward takes it up again.
//
// The backward runs the block's program a second time, under autograd. Where a call's results were kept, the kernel
// below autograd is not run again: what it returned in the forward is handed over in its stead. Autograd itself stays
// as it is and makes the nodes and saves the tensors that it would make and save without, so gradients are equal to the
// bit, for whatever operator, device and version of libtorch, and no derivative is written here.
//
// How: ADInplaceOrView is the dispatch key right below autograd; operators that neither write in place nor return a
// view have no kernel there. `select` gives the tape's operators one, which passes the call on unless a kept call of a
// program is under way on this thread.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "engine/graph.h"

namespace stroma::engine {

class Program;

// Of one call of a program: whether its results are kept, and those of which operators below autograd.
struct KeptCall {
  // kShape: nothing in the backward reads what the operator computes; shape and dtype are all that is kept.
  enum class What : uint8_t { kNothing, kResult, kShape } what = What::kNothing;
  std::vector<c10::OperatorHandle> kernels;
};

// By program, by node; a program without a kept call has none.
using Selection = std::vector<std::vector<KeptCall>>;

// Resolves a tape's choice for these programs. Throws TAPE for a value that no node computes, or an operator whose
// results cannot be kept.
Selection select(const KeptValues& kept, const std::vector<Program>& programs);

// What one run of a program kept, by node. `nullopt`: the node computes again, since it changed a result in place.
struct KeptResults {
  struct Result {
    c10::OperatorHandle op;
    std::vector<c10::IValue> values;
  };
  std::vector<std::optional<std::vector<Result>>> nodes;
  bool empty() const { return nodes.empty(); }
};

// Stands around one run of a program on this thread: fills `results`, or hands them over and leaves none.
class Keeper {
 public:
  enum class Mode : uint8_t { kKeep, kReplay };
  Keeper(Mode mode, const std::vector<KeptCall>& calls, KeptResults& results);
  ~Keeper();
  Keeper(const Keeper&) = delete;
  Keeper& operator=(const Keeper&) = delete;

  void begin(size_t node);
  // Throws NATIVE where a replayed node did not ask for what was kept of it.
  void end(size_t node, const at::Tensor& output);
  // In mode kKeep every value is cut off from the graph that made it, which goes at once.
  at::Tensor cut(at::Tensor value) const;

 private:
  static void intercept(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack);
  friend void cover(const c10::OperatorHandle& op);
  bool concerns(const c10::OperatorHandle& op) const;
  void keep(const c10::OperatorHandle& op, const torch::jit::Stack& stack);
  bool hand_over(const c10::OperatorHandle& op, torch::jit::Stack& stack);

  Mode mode_;
  const std::vector<KeptCall>& calls_;
  KeptResults& results_;
  const KeptCall* call_ = nullptr;  // of the node under way, where it is kept
  size_t node_ = 0, next_ = 0;
};

}  // namespace stroma::engine
