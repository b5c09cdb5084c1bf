// Executes tapes: one optimizer step is one walk over the instructions. No autograd across blocks; everything that a
// schedule decides (order, places, copies, recompute) stands in the tape, and nothing here knows models or operators by
// name. executor.cc walks, passes.cc runs blocks forward and backward, update.cc closes and applies gradients,
// run.cc runs forwards without a tape.
#pragma once
#include <ATen/core/Tensor.h>

#include <atomic>
#include <map>
#include <memory>
#include <optional>

#include "engine/copies.h"
#include "engine/kept.h"
#include "engine/nccl_group.h"
#include "engine/program.h"
#include "engine/state.h"

namespace stroma::engine {

using Batch = std::map<std::string, at::Tensor>;

struct AdamW {
  double beta1, beta2, epsilon, weight_decay;
};

struct SessionSpec {
  at::ScalarType dtype = at::kFloat;  // the graph's
  at::Device device = at::kCPU;
  StateFormat format;
  AdamW optimizer{};
  std::optional<int64_t> device_bytes;  // cap of a simulated device; a CUDA device's share that may be used
  SimOptions sim;
  // Losses are read at the end of a visit: on a device of its own, reading one waits for all that was issued before.
  bool reads_late = false;
  std::string disk_folder;
  std::shared_ptr<Ranks> ranks;  // null: this session trains alone
  bool over_nccl = false;        // what ranks exchange; else over Gloo
  std::vector<int> context;      // ranks that share every row with this one, by their place; empty: rows are whole
};

struct StepRequest {
  std::shared_ptr<const Tape> tape;
  std::shared_ptr<const Tape> flush;  // for tapes that update on forward: carries out what this step leaves pending
  std::vector<Batch> micro_batches;
  std::map<std::string, int64_t> counts;  // by loss term, over all ranks' shares of the rows; empty: of micro_batches
  int64_t step = 0, seed = 0;
  double learning_rate = 0;
  std::optional<double> max_grad_norm;
  bool profile = false;
};

// By instruction: seconds of the steady clock, bytes on the device.
struct Profile {
  Timeline timeline;
  std::vector<int64_t> device_bytes, device_peak;
};

struct StepResult {
  std::vector<double> losses;  // by loss term
  std::vector<int64_t> counts;
  double loss = 0;
  std::vector<double> micro_batch_losses;
  double grad_norm = 0;
  bool finite = true;
  int non_finite_micro_batch = -1;
  double non_finite_loss = 0;
  std::vector<int> skipped_blocks;
  double begin = 0, seconds = 0;
  CopyCounts copied;
  int64_t peak_host_bytes = 0, peak_device_bytes = 0, host_bytes = 0;
  int64_t new_segments = 0;  // times that a card's driver was asked for memory
  std::optional<Profile> profile;
};

// A graph with its programs made ready; shares the state of the model by parameter name.
struct LoadedGraph {
  Graph graph;
  std::vector<Program> programs;
  std::vector<std::vector<int>> parameters;  // by block: into ModelState::parameters
  std::vector<std::vector<int>> owners;      // by block: the blocks that own them, ascending
  std::vector<char> has_backward;            // by block: whether a gradient reaches it
};

class Executor {
 public:
  explicit Executor(const SessionSpec& spec);

  void load(Graph graph, std::optional<Placement> placement);
  void attach(const std::string& name, Graph graph);
  // Throws before any parameter changed, or returns with all of them updated (or, not finite, none); tapes that update
  // on backward: see docs/memory.md.
  StepResult step(const StepRequest& request, const std::atomic<bool>& cancelled);
  void flush();
  // counts: as in StepRequest. Where rows are shared, what comes out is of this rank's share.
  std::map<std::string, at::Tensor> run(const std::string& name, const Batch& batch, int64_t seed,
                                        const std::map<std::string, int64_t>& counts = {});
  at::Tensor gradient(const std::string& name);
  ModelState& state();  // with nothing pending
  const Graph& graph() const;
  const Memory* memory() const { return state_ ? &state_->memory() : nullptr; }

 private:
  // What one pass of a block over a micro-batch holds until its backward.
  struct Kept {
    std::vector<at::Tensor> inputs, parameters, outputs;
    KeptResults results;
  };
  // plain: without autograd. graph: with it. keep, replay: recompute "selective", see kept.h.
  enum class Run : uint8_t { kPlain, kGraph, kKeep, kReplay };
  // Gradients retained for the next step's forward, and the closed record of their step.
  struct Pending {
    bool valid = false;
    double learning_rate = 0, coefficient = 1;
    int64_t seed = 0;
    std::vector<char> touched;               // by parameter; cleared as each is updated
    std::vector<double> block_coefficients;  // clipping by block
  };
  struct Step;  // all that lives for one step

  std::vector<Program> ready(const Graph& graph) const;
  void link(LoadedGraph& loaded) const;
  DimValues bind(const Graph& graph, const Batch& batch, const std::string& where) const;
  int64_t count(const LossTerm& term, const Batch& batch) const;
  // With a context (exchange.cc).
  int64_t place_in_context() const;
  bool in_step(const Step& step) const;
  void end_others(const Step& step) const;
  std::vector<at::Tensor> run_block(const LoadedGraph& loaded, int block, std::vector<at::Tensor> inputs,
                                    const std::vector<at::Tensor>& parameters, const DimValues& dims,
                                    Keeper* keeper = nullptr) const;
  // Without a tape (run.cc).
  at::Tensor flat_parameters(int owner) const;
  int rank_of_owner(int owner) const;
  void lend(const at::Tensor& parameter, int to) const;
  at::Tensor borrow(const Parameter& parameter, int from) const;
  std::vector<int> ranks_of_blocks(const LoadedGraph& loaded) const;
  std::vector<std::vector<char>> readers(const LoadedGraph& loaded, const std::vector<int>& rank_of) const;
  void share(std::vector<at::Tensor>& outputs, const std::vector<char>& readers, int from) const;
  // With ranks (exchange.cc).
  void report(Step& step);
  void exchange(Step& step);
  void gather_shards(int owner, at::Tensor& whole) const;
  void meet_sharers() const;

  std::pair<int64_t, int64_t> device_memory() const;  // live, peak
  void reset_device_peak();
  void prepare(const Tape& tape) const;
  void walk(Step& step, const std::atomic<bool>& cancelled);
  void execute(Step& step, const Instruction& at);

  const Place& place(const Step& step, int index, const char* what) const;
  at::Tensor boundary(Step& step, int index, int micro_batch, int block, int output, at::ScalarType dtype) const;
  void put(Step& step, int index, const at::Tensor& value) const;
  std::vector<at::Tensor> parameters_at(const Step& step, const Instruction& at) const;
  std::vector<at::Tensor> block_inputs(Step& step, const Instruction& at) const;
  Run forward_of(const Step& step, const Instruction& at) const;
  Kept forward(Step& step, const Instruction& at, Run how, KeptResults results = {});
  void total_losses(Step& step) const;
  void store_outputs(Step& step, const Instruction& at, const Kept& ran);
  void backward(Step& step, const Instruction& at, const Kept& ran);
  void record_loss(Step& step, const Instruction& at, const Kept& ran);
  void read_losses(Step& step);
  void cast(Step& step, const Instruction& at);
  at::Tensor summed(const Step& step, const Instruction& at, const Parameter& parameter, bool form) const;
  at::Tensor user_sums(const Step& step, const Instruction& at, const Parameter& parameter, bool form) const;
  double block_coefficient(const Step& step, int block) const;
  void partial(Step& step, const Instruction& at);
  void reduce(Step& step, const Instruction& at);
  void share_norms(Step& step, int block) const;
  at::Tensor combined(const std::vector<at::Tensor>& norms) const;
  bool reached(const Step& step, const Parameter& parameter) const;
  std::vector<int> users_of(int owner) const;
  bool borrowed(int block, int use) const;
  void mark_untouched(const at::Tensor& sum) const;
  void hear_of_uses(Step& step, const Instruction& at) const;
  void norm(Step& step, const Instruction& at);
  void coefficient(Step& step);
  void pack(Step& step, const Instruction& at);
  void update(Step& step, const Instruction& at);

  SessionSpec spec_;
  std::unique_ptr<nccl::Group> cards_;         // what rows of the context are passed around in, over NCCL
  std::map<std::string, std::string> groups_;  // symbols of the graph: names in c10d's registry
  Account& account_;
  int64_t library_bytes_ = 0;  // of a card, before anything of this session's
  std::unique_ptr<Copies> copies_;
  std::unique_ptr<LoadedGraph> train_;
  std::unique_ptr<ModelState> state_;
  std::map<std::string, std::unique_ptr<LoadedGraph>> attached_;
  Pending pending_;
  std::shared_ptr<const Tape> flush_tape_;
  // The last step's sums, while they are where they were (update at the end): place and touched flags by block.
  std::vector<std::optional<Place>> last_sums_;
  std::vector<std::vector<char>> last_touched_;
  std::shared_ptr<const Tape> prepared_;
  Selection selection_;  // of prepared_; empty but for recompute "selective"
  bool broken_ = false;  // a copy failed: homes hold a mixture of versions
};

}  // namespace stroma::engine
