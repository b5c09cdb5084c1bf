// What lives for one walk of the executor; shared by the executor's files.
#pragma once
#include "engine/executor.h"

namespace stroma::engine {

struct Executor::Step {
  Step(const StepRequest& request, const Tape& tape) : request(request), tape(tape) {}
  const StepRequest& request;
  const Tape& tape;
  StepResult result;
  std::vector<Batch> batches;                                          // on the device
  std::vector<DimValues> dims;                                         // by micro-batch
  std::vector<at::Tensor> slots;                                       // Space::kSlot
  std::vector<std::vector<std::vector<std::vector<int64_t>>>> shapes;  // of boundaries: micro-batch, block, output
  std::map<std::pair<int, int>, Kept> kept;                            // by block, micro-batch
  std::vector<std::vector<char>> touched;  // by block, index of parameter: sums hold something
  std::vector<int64_t> counts;             // by loss term, over all micro-batches
  std::vector<std::vector<int64_t>> micro_counts;
  std::vector<std::vector<std::optional<double>>> losses;  // by loss term, micro-batch
  struct Unread {
    int term, micro_batch;
    at::Tensor loss;
  };
  std::vector<Unread> unread;  // in the order of their passes
  // By parameter; undefined where untouched: of what this rank holds, and once the ranks have exchanged them of all.
  std::vector<at::Tensor> own_norms, norms;
  Pending next;  // what this step will leave
  double coefficient = 1;
  Ranks::Gathering reported;  // what this rank has told the others, and waits to hear of them
  bool agreed = false;        // the ranks know each other's losses and failures
  bool closed = false;        // the coefficient is known
  bool committed = false;     // this step's own gradients have changed a parameter
  bool dead = false;          // not finite or cancelled: no more arithmetic, only what keeps the state whole
  bool aborted = false;
  std::exception_ptr failure;  // what an instruction threw
};

// Index of the loss term that an output of a block is; -1 for a boundary.
inline int loss_of(const Graph& graph, int block, int output) {
  for (size_t i = 0; i < graph.losses.size(); ++i)
    if (graph.losses[i].block == block && graph.losses[i].output == output) return static_cast<int>(i);
  return -1;
}

int loss_named(const Graph& graph, const std::string& name);
// What the caller says that a loss counts; throws INVALID_ARGUMENT where it says nothing.
int64_t count_given(const std::map<std::string, int64_t>& counts, const LossTerm& term);
double steady_seconds();

}  // namespace stroma::engine
