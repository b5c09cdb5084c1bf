#include "engine/executor.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "engine/cuda_device.h"
#include "engine/error.h"
#include "engine/host_allocator.h"
#include "engine/shared_memory.h"
#include "engine/step.h"

namespace stroma::engine {

using Op = Instruction::Op;

int loss_named(const Graph& graph, const std::string& name) {
  for (size_t i = 0; i < graph.losses.size(); ++i)
    if (graph.losses[i].name == name) return static_cast<int>(i);
  fail("GRAPH", "[graph] there is no loss term ", name);
}

double steady_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Executor::Executor(const SessionSpec& spec) : spec_(spec), account_(Account::make()) {
  if (!spec_.device.is_cpu()) {
    if (!cuda::built()) cuda::check_device(spec_.device);
    return;  // the rest takes long, and is load()'s, on the session's thread
  }
  if (spec_.device_bytes.has_value()) account_.cap = *spec_.device_bytes;
  // The adversary that needs no clock plays within one process.
  copies_ = spec_.sim.adversary.has_value() && !spec_.ranks ? adversary_copies(*spec_.sim.adversary)
                                                            : threaded_copies(spec_.sim, spec_.ranks);
}

ModelState& Executor::state() {
  if (!state_) fail("INVALID_ARGUMENT", "[session] no graph is loaded: call load() first");
  flush();
  return *state_;
}

const Graph& Executor::graph() const {
  if (!train_) fail("INVALID_ARGUMENT", "[session] no graph is loaded: call load() first");
  return train_->graph;
}

namespace {

// Update on backward has no way back: blocks above the one that failed have taken their step.
[[noreturn]] void fail_step(const std::exception_ptr& failure, bool committed) {
  if (committed) {
    try {
      std::rethrow_exception(failure);
    } catch (const Error& error) {
      fail(error.code, error.what(), ". Some blocks were updated before this: resume from a checkpoint to be exact");
    } catch (const std::exception& error) {
      fail("NATIVE", error.what(), ". Some blocks were updated before this: resume from a checkpoint to be exact");
    }
  }
  std::rethrow_exception(failure);
}

Error out_of_memory(const std::string& block, const std::string& why, int64_t arena, int64_t passes) {
  std::ostringstream text;
  text << "[block " << block << "] " << why << ". Of what is held, " << arena
       << " bytes are the plan's own (parameters, state, sums, boundaries) and " << passes
       << " what its passes compute with. Take a smaller micro-batch, a shorter sequence or recompute \"all\", or plan "
          "with less device memory";
  return Error("OUT_OF_MEMORY", text.str());
}

}  // namespace

std::vector<Program> Executor::ready(const Graph& graph) const {
  std::vector<Program> programs;
  for (const ProgramSpec& spec : graph.programs) programs.emplace_back(spec, spec_.device, groups_);
  for (const BlockSpec& block : graph.blocks) {
    if (block.program < 0 || block.program >= static_cast<int>(programs.size()))
      fail("GRAPH", "[graph] block ", block.name, " names program ", block.program, ", which does not exist");
    const ProgramSpec& spec = programs[block.program].spec();
    if (block.inputs.size() != spec.inputs.size() || block.parameters.size() != spec.parameters.size())
      fail("GRAPH", "[graph] block ", block.name, " does not fit its program ", spec.name);
  }
  return programs;
}

// Which blocks own what each block uses, and which have a backward.
void Executor::link(LoadedGraph& loaded) const {
  for (const auto& indices : loaded.parameters) {
    std::vector<int> owners;
    for (const int p : indices) owners.push_back(state_->parameters[p].spec.owner);
    std::sort(owners.begin(), owners.end());
    owners.erase(std::unique(owners.begin(), owners.end()), owners.end());
    loaded.owners.push_back(std::move(owners));
  }
  const Graph& graph = loaded.graph;
  loaded.has_backward.assign(graph.blocks.size(), 0);
  for (const LossTerm& term : graph.losses) loaded.has_backward[term.block] = 1;
  for (size_t b = graph.blocks.size(); b-- > 0;) {
    if (!loaded.has_backward[b]) continue;
    const BlockSpec& block = graph.blocks[b];
    for (size_t i = 0; i < block.inputs.size(); ++i)
      if (block.inputs[i].block >= 0 && graph.programs[block.program].inputs[i].grad)
        loaded.has_backward[block.inputs[i].block] = 1;
  }
}

void Executor::load(Graph graph, std::optional<Placement> placement) {
  if (train_) fail("INVALID_ARGUMENT", "[session] a graph is loaded already: one session trains one model");
  if (!spec_.device.is_cpu()) {
    library_bytes_ = cuda::open(spec_.device, spec_.device_bytes);
    copies_ = cuda::copies(spec_.device, spec_.ranks, spec_.over_nccl);
  }
  auto loaded = std::make_unique<LoadedGraph>();
  const bool staged = placement.has_value() && placement->stages.has_value();
  if (staged && placement->stages->context > 1) spec_.context = placement->stages->context_group();
  // Waits for the others, so not where the session is made.
  if (!spec_.context.empty()) {
    if (spec_.over_nccl) cards_ = nccl::group(spec_.device, spec_.ranks, spec_.context);
    groups_["context:" + std::to_string(spec_.context.size())] =
        cards_ != nullptr ? cards_->name() : spec_.ranks->group(spec_.context);
  }
  loaded->programs = ready(graph);
  at::Tensor shared;
  if (placement.has_value() && placement->shared_bytes > 0) {
    if (!staged || !spec_.ranks) fail("TAPE", "[tape] a plan with memory that ranks share, and there is one rank");
    shared = shared_bytes(*spec_.ranks, placement->stages->replica_group(), placement->shared_bytes,
                          /*pinned=*/!spec_.device.is_cpu());
  }
  state_ = std::make_unique<ModelState>(graph, spec_.dtype, spec_.format, std::move(placement), spec_.device, account_,
                                        spec_.disk_folder, spec_.ranks && (staged || spec_.context.size() < 2),
                                        std::move(shared));
  for (const BlockSpec& block : graph.blocks) loaded->parameters.push_back(block.parameters);
  loaded->graph = std::move(graph);
  link(*loaded);
  train_ = std::move(loaded);
}

void Executor::attach(const std::string& name, Graph graph) {
  auto loaded = std::make_unique<LoadedGraph>();
  loaded->programs = ready(graph);
  if (!state_) fail("INVALID_ARGUMENT", "[session] no graph is loaded: call load() first");
  for (const BlockSpec& block : graph.blocks) {
    std::vector<int> indices;
    for (const int p : block.parameters) {
      Parameter& parameter = state_->find(graph.parameters[p].name);
      if (parameter.spec.shape != graph.parameters[p].shape)
        fail("GRAPH", "[session] parameter ", parameter.spec.name, " has shape ", at::IntArrayRef(parameter.spec.shape),
             " in the trained graph and ", at::IntArrayRef(graph.parameters[p].shape), " in the attached one");
      indices.push_back(static_cast<int>(&parameter - state_->parameters.data()));
    }
    loaded->parameters.push_back(std::move(indices));
  }
  loaded->graph = std::move(graph);
  link(*loaded);
  attached_[name] = std::move(loaded);
}

DimValues Executor::bind(const Graph& graph, const Batch& batch, const std::string& where) const {
  DimValues dims(graph.dims.size(), kUnbound);
  // Plain names first, so that an expression may use names that another input binds.
  for (const bool names_only : {true, false}) {
    for (const BatchInput& input : graph.inputs) {
      const auto it = batch.find(input.name);
      if (it == batch.end())
        fail("INVALID_ARGUMENT", "[session] the batch has no input \"", input.name, "\", at ", where);
      const at::Tensor& tensor = it->second;
      if (tensor.scalar_type() != input.dtype)
        fail("INVALID_ARGUMENT", "[session] expected input \"", input.name, "\" as ", input.dtype, ", got ",
             tensor.scalar_type(), ", at ", where);
      if (tensor.dim() != static_cast<int64_t>(input.shape.size()))
        fail("SHAPE", "[session] expected input \"", input.name, "\" with ", input.shape.size(), " dims, got shape ",
             tensor.sizes(), ", at ", where);
      for (size_t d = 0; d < input.shape.size(); ++d) {
        const int name = input.shape[d].single_name();
        const int64_t size = tensor.size(static_cast<int64_t>(d));
        if (name >= 0 && dims[name] == kUnbound) dims[name] = size;
        if (names_only && name < 0) continue;
        const int64_t expected = input.shape[d].evaluate(graph.dims, dims);
        if (expected != size)
          fail("SHAPE", "[session] expected input \"", input.name, "\" to have ", expected,
               name >= 0 ? " (dim " + graph.dims.name(name) + ")" : "", " in dim ", d, ", got shape ", tensor.sizes(),
               ", at ", where);
      }
    }
  }
  return dims;
}

int64_t Executor::count(const LossTerm& term, const Batch& batch) const {
  const auto it = batch.find(term.count_input);
  if (it == batch.end())
    fail("INVALID_ARGUMENT", "[session] the batch has no input \"", term.count_input, "\", which counts loss ",
         term.name);
  return it->second.ne(term.count_ignore).sum().item<int64_t>();
}

int64_t count_given(const std::map<std::string, int64_t>& counts, const LossTerm& term) {
  const auto found = counts.find(term.name);
  if (found == counts.end()) fail("INVALID_ARGUMENT", "[session] counts lack loss ", term.name);
  return found->second;
}

// A tape is for this session when its format and homes are; places are checked once, copies against both their ends.
void Executor::prepare(const Tape& tape) const {
  if (!(tape.format == state_->format()))
    fail("TAPE", "[tape] is for another storage, masterWeight or optimizer than this session's");
  const Placement& ours = state_->placement();
  const auto same = [](const std::optional<Place>& a, const std::optional<Place>& b) {
    return a.has_value() == b.has_value() &&
           (!a.has_value() || (a->space == b->space && a->offset == b->offset && a->bytes == b->bytes));
  };
  bool equal = tape.placement.param.size() == ours.param.size() && tape.placement.state.size() == ours.state.size();
  for (size_t b = 0; equal && b < ours.param.size(); ++b)
    equal = same(tape.placement.param[b], ours.param[b]) && same(tape.placement.state[b], ours.state[b]) &&
            same(b < tape.placement.shared.size() ? tape.placement.shared[b] : std::nullopt, ours.shared[b]);
  equal = equal && tape.placement.stages == ours.stages;
  if (!equal)
    fail("TAPE", "[tape] has other homes for the state than this session. Load the session with this plan's placement");
  for (const Place& place : tape.places) {
    if (place.space == Space::kSlot) {
      if (place.offset < 0 || place.offset >= tape.slots)
        fail("TAPE", "[tape] slot ", place.offset, " is not one of ", tape.slots);
    } else {
      state_->memory().check(place, "a place");
    }
  }
  const int places = static_cast<int>(tape.places.size()), blocks = static_cast<int>(train_->graph.blocks.size());
  for (size_t i = 0; i < tape.instructions.size(); ++i) {
    const Instruction& at = tape.instructions[i];
    for (const int wait : at.waits)
      if (wait < 0 || wait >= static_cast<int>(i)) fail("TAPE", "[tape] instruction ", i, " waits for ", wait);
    for (const auto* list : {&at.params, &at.in, &at.out, &at.d_out, &at.d_in, &at.sums})
      for (const int p : *list)
        if (p < -1 || p >= places) fail("TAPE", "[tape] there is no place ", p);
    for (const int p : {at.from, at.to, at.param, at.state})
      if (p < -1 || p >= places) fail("TAPE", "[tape] there is no place ", p);
    if (at.op == Op::kCopy) {
      if (at.from < 0 || at.to < 0) fail("TAPE", "[tape] a copy lacks a place, at instruction ", i);
      const Place &from = tape.places[at.from], &to = tape.places[at.to];
      constexpr Space kEnds[kCopyQueues][2] = {{Space::kHost, Space::kDevice},
                                               {Space::kDevice, Space::kHost},
                                               {Space::kDisk, Space::kHost},
                                               {Space::kHost, Space::kDisk}};
      const auto& ends = kEnds[static_cast<int>(at.queue)];
      const bool in = at.queue == CopyQueue::kIn, out = at.queue == CopyQueue::kOut;
      if ((from.space != ends[0] && !(in && from.space == Space::kShared)) ||
          (to.space != ends[1] && !(out && to.space == Space::kShared)))
        fail("TAPE", "[tape] a copy's places are not those of its queue, at instruction ", i);
      if (at.at < 0 || at.bytes < 0 || at.at > from.bytes - at.bytes || at.at > to.bytes - at.bytes)
        fail("TAPE", "[tape] a copy goes beyond its places, at instruction ", i);
      const auto is_own = [&to](const std::optional<Place>& home) {
        return home.has_value() && home->space == Space::kShared && to.offset >= home->offset &&
               to.offset + to.bytes <= home->offset + home->bytes;
      };
      if (to.space == Space::kShared && std::none_of(ours.param.begin(), ours.param.end(), is_own))
        fail("TAPE", "[tape] another rank writes these bytes of shared memory, at instruction ", i);
      continue;
    }
    if (at.op == Op::kSend || at.op == Op::kReceive) {
      const int place = at.op == Op::kSend ? at.from : at.to;
      const int ranks = spec_.ranks ? spec_.ranks->spec().size : 1;
      if (place < 0 || tape.places[place].space == Space::kSlot || tape.places[place].space == Space::kDisk)
        fail("TAPE", "[tape] what ranks exchange lies on the device or the host, at instruction ", i);
      if (at.bytes < 0 || at.bytes > tape.places[place].bytes)
        fail("TAPE", "[tape] a rank is sent more than its place holds, at instruction ", i);
      if (at.peer < 0 || at.peer >= ranks || at.peer == spec_.ranks->spec().rank)
        fail("TAPE", "[tape] there is no other rank ", at.peer, " of ", ranks, ", at instruction ", i);
      continue;
    }
    if ((at.op == Op::kReport || at.op == Op::kAgree) && !spec_.ranks)
      fail("TAPE", "[tape] there are no ranks to agree with, at instruction ", i);
    if (at.op == Op::kCoefficient || at.op == Op::kReport || at.op == Op::kAgree) continue;
    if (at.block < 0 || at.block >= blocks) fail("TAPE", "[tape] there is no block ", at.block);
    const bool passes = at.op == Op::kForward || at.op == Op::kTurn || at.op == Op::kBackward;
    if (passes && (at.micro_batch < 0 || at.micro_batch >= tape.micro_batches))
      fail("TAPE", "[tape] there is no micro-batch ", at.micro_batch);
  }
}

void Executor::execute(Step& step, const Instruction& at) {
  const bool passes = at.op == Op::kForward || at.op == Op::kTurn || at.op == Op::kBackward || at.op == Op::kCast;
  if (!passes && !step.dead) read_losses(step);
  if (step.dead) {
    // Updates that an earlier step left pending are still carried out: their stores follow.
    if (at.op == Op::kUpdate && at.retained) update(step, at);
    // Other ranks wait to hear of it.
    if (at.op == Op::kReport) report(step);
    if (at.op == Op::kAgree || (at.op == Op::kCoefficient && spec_.ranks)) exchange(step);
    return;
  }
  switch (at.op) {
    case Op::kForward: {
      const Run how = forward_of(step, at);
      Kept ran = forward(step, at, how);
      record_loss(step, at, ran);
      store_outputs(step, at, ran);
      if (how == Run::kKeep) ran.inputs = ran.parameters = ran.outputs = {};
      if (how != Run::kPlain) step.kept[{at.block, at.micro_batch}] = std::move(ran);
      break;
    }
    case Op::kTurn: {
      const Kept ran = forward(step, at, Run::kGraph);
      record_loss(step, at, ran);
      if (step.result.finite || in_step(step)) backward(step, at, ran);
      break;
    }
    case Op::kBackward: {
      const auto kept = step.kept.find({at.block, at.micro_batch});
      if (kept == step.kept.end()) {
        backward(step, at, forward(step, at, Run::kGraph));
      } else {
        Kept ran = std::move(kept->second);
        step.kept.erase(kept);
        if (!ran.results.empty()) ran = forward(step, at, Run::kReplay, std::move(ran.results));
        backward(step, at, ran);
      }
      break;
    }
    case Op::kCast:
      cast(step, at);
      break;
    case Op::kNorm:
      norm(step, at);
      break;
    case Op::kPartial:
      partial(step, at);
      break;
    case Op::kReduce:
      reduce(step, at);
      break;
    case Op::kReport:
      report(step);
      break;
    case Op::kAgree:
      exchange(step);
      break;
    case Op::kCoefficient:
      coefficient(step);
      break;
    case Op::kPack:
      pack(step, at);
      break;
    case Op::kUpdate:
      update(step, at);
      break;
    case Op::kCopy:
    case Op::kSend:
    case Op::kReceive:
      break;
  }
  // A loss or norm that is not finite ends the arithmetic of the step.
  if (!step.result.finite && !in_step(step)) step.dead = true;
}

std::pair<int64_t, int64_t> Executor::device_memory() const {
  if (spec_.device.is_cpu()) return {account_.live, account_.peak};
  const cuda::DeviceMemory memory = cuda::memory(spec_.device);
  return {memory.live - library_bytes_, memory.peak - library_bytes_};
}

void Executor::reset_device_peak() {
  if (spec_.device.is_cpu())
    account_.reset_peak();
  else
    cuda::reset_peak(spec_.device);
}

void Executor::walk(Step& step, const std::atomic<bool>& cancelled) {
  const Tape& tape = step.tape;
  const AccountScope scope(account_);
  std::optional<Profile>& profile = step.result.profile;
  if (step.request.profile) {
    profile.emplace();
    const size_t n = tape.instructions.size();
    profile->timeline.start.assign(n, 0);
    profile->timeline.end.assign(n, 0);
    profile->device_bytes.assign(n, 0);
    profile->device_peak.assign(n, 0);
  }
  reset_device_peak();
  int64_t peak = 0;
  copies_->begin(tape, state_->memory(), profile.has_value() ? &profile->timeline : nullptr);
  try {
    for (size_t i = 0; i < tape.instructions.size(); ++i) {
      const Instruction& at = tape.instructions[i];
      if (at.queued()) continue;  // the queues have it
      // What the others have been told stands.
      const bool settled = step.agreed || step.reported != nullptr || (step.closed && !tape.has_copies);
      if (cancelled.load() && !tape.flush && !step.dead && !step.committed && !settled) {
        step.aborted = true;
        step.dead = !in_step(step);
      }
      if (step.dead && !tape.has_copies) break;  // nothing is on its way
      copies_->await(static_cast<int>(i));
      if (profile.has_value()) profile->timeline.start[i] = steady_seconds();
      // A pass that fails must not leave half of the state moved: the walk goes on without arithmetic.
      std::exception_ptr failure;
      try {
        execute(step, at);
      } catch (const c10::OutOfMemoryError& error) {
        failure = std::make_exception_ptr(out_of_memory(train_->graph.blocks[std::max(0, at.block)].name,
                                                        error.what_without_backtrace(), state_->memory().device_bytes(),
                                                        device_memory().first - state_->memory().device_bytes()));
      } catch (const c10::Error& error) {
        const std::string lost = spec_.ranks ? spec_.ranks->lost() : "";
        failure = std::make_exception_ptr(
            lost.empty() ? Error("NATIVE", "[block " + train_->graph.blocks[std::max(0, at.block)].name + "] " +
                                               error.what_without_backtrace())
                         : Error("RANKS", lost));
      } catch (...) {
        failure = std::current_exception();
      }
      // The first one is why; what the others then say of it is not.
      if (step.failure == nullptr) step.failure = failure;
      if (step.failure != nullptr && !step.dead) {
        step.dead = true;
        step.kept.clear();
        if (in_step(step)) end_others(step);
      }
      if (profile.has_value()) {
        const auto [live, highest] = device_memory();
        peak = std::max(peak, highest);
        profile->timeline.end[i] = steady_seconds();
        profile->device_bytes[i] = live;
        profile->device_peak[i] = highest;
        reset_device_peak();
      }
      copies_->finished(static_cast<int>(i));
    }
    if (!step.dead) read_losses(step);
    copies_->end(/*abort=*/false);
  } catch (...) {
    if (tape.has_copies) broken_ = true;
    copies_->end(/*abort=*/true);
    throw;
  }
  step.result.copied = copies_->counts();
  step.result.peak_device_bytes = std::max(peak, device_memory().second);
}

StepResult Executor::step(const StepRequest& request, const std::atomic<bool>& cancelled) {
  if (!state_) fail("INVALID_ARGUMENT", "[session] no graph is loaded: call load() first");
  const Graph& graph = train_->graph;
  const Tape& tape = *request.tape;
  if (broken_)
    fail("NATIVE",
         "[session] a copy failed in an earlier step, and state moved only in part. Resume from a checkpoint");
  if (tape.flush) fail("INVALID_ARGUMENT", "[session] expected the tape of a step, got that of a flush");
  if (static_cast<int>(request.micro_batches.size()) != tape.micro_batches)
    fail("INVALID_ARGUMENT", "[session] expected ", tape.micro_batches, " micro-batches, as the tape has, got ",
         request.micro_batches.size());
  if (tape.update == UpdateOrder::kForward && !request.flush)
    fail("INVALID_ARGUMENT", "[session] a tape that updates on forward needs its flush tape in the request");
  if (prepared_ != request.tape) {
    prepare(tape);
    if (request.flush) prepare(*request.flush);
    // Another schedule may keep gradients elsewhere.
    flush();
    selection_ = tape.kept.has_value() ? select(*tape.kept, train_->programs) : Selection{};
    prepared_ = request.tape;
  }
  const double begin = steady_seconds();
  const int64_t segments = spec_.device.is_cpu() ? 0 : cuda::memory(spec_.device).segments;
  reset_host_peak();
  Step step(request, tape);
  step.slots.resize(tape.slots);
  step.norms.resize(state_->parameters.size());
  step.own_norms.resize(state_->parameters.size());
  step.next.touched.assign(state_->parameters.size(), 0);
  step.result.losses.assign(graph.losses.size(), 0);
  step.result.micro_batch_losses.assign(tape.micro_batches, 0);
  step.counts.assign(graph.losses.size(), 0);
  step.losses.assign(graph.losses.size(), std::vector<std::optional<double>>(tape.micro_batches));
  step.shapes.resize(tape.micro_batches);
  for (auto& by_block : step.shapes) by_block.resize(graph.blocks.size());
  for (const BlockSpec& block : graph.blocks) step.touched.emplace_back(block.parameters.size(), 0);
  step.batches = request.micro_batches;
  const Placement& placement = state_->placement();
  for (int m = 0; m < tape.micro_batches; ++m) {
    const Batch& batch = request.micro_batches[m];
    step.dims.push_back(bind(graph, batch, "micro-batch " + std::to_string(m)));
    std::vector<int64_t> counts;
    for (const LossTerm& term : graph.losses) counts.push_back(count(term, batch));
    for (size_t i = 0; i < counts.size(); ++i) step.counts[i] += counts[i];
    step.micro_counts.push_back(std::move(counts));
    if (!placement.runs(m)) {
      step.batches[m].clear();
      continue;
    }
    // Boundaries that come from other ranks have the shapes that the graph says.
    for (size_t b = 0; b < graph.blocks.size(); ++b) {
      if (placement.is_mine(b)) continue;
      for (const ProgramOutput& output : graph.programs[graph.blocks[b].program].outputs) {
        std::vector<int64_t> shape;
        for (const Expression& size : output.shape) shape.push_back(size.evaluate(graph.dims, step.dims[m]));
        step.shapes[m][b].push_back(std::move(shape));
      }
    }
    if (!spec_.device.is_cpu())
      for (auto& [name, tensor] : step.batches[m]) tensor = tensor.to(spec_.device);
  }
  if (!request.counts.empty())
    for (size_t i = 0; i < graph.losses.size(); ++i) step.counts[i] = count_given(request.counts, graph.losses[i]);
  for (size_t i = 0; i < graph.losses.size(); ++i)
    if (step.counts[i] == 0)
      fail("DATA", "[session] nothing to learn from: no element of \"", graph.losses[i].count_input, "\" differs from ",
           graph.losses[i].count_ignore, " in any micro-batch");
  step.result.counts = step.counts;
  last_sums_.assign(graph.blocks.size(), std::nullopt);
  if (request.flush) flush_tape_ = request.flush;

  meet_sharers();
  walk(step, cancelled);
  pending_ = step.dead ? Pending{} : std::move(step.next);
  // Others may have updated once they had agreed.
  const bool committed = step.committed || (step.agreed && tape.update == UpdateOrder::kBackward);
  if (step.failure != nullptr) fail_step(step.failure, committed);
  if (step.aborted) fail("ABORTED", "[session] the step was cancelled; nothing of it was kept");
  total_losses(step);
  last_touched_ = std::move(step.touched);
  step.result.begin = begin;
  step.result.seconds = steady_seconds() - begin;
  if (!spec_.device.is_cpu()) step.result.new_segments = cuda::memory(spec_.device).segments - segments;
  step.result.host_bytes = state_->host_bytes();
  step.result.peak_host_bytes = host_memory().peak + step.result.host_bytes - state_->memory().host_bytes();
  return std::move(step.result);
}

void Executor::flush() {
  if (!pending_.valid) return;
  StepRequest request;
  request.tape = flush_tape_;
  Step step(request, *flush_tape_);
  const std::atomic<bool> never{false};
  walk(step, never);
  pending_ = {};
  if (step.failure != nullptr) std::rethrow_exception(step.failure);
}

at::Tensor Executor::gradient(const std::string& name) {
  const Parameter& p = state().find(name);
  if (!state_->placement().is_mine(p.spec.owner))
    fail("INVALID_ARGUMENT", "[session] the gradient of \"", name, "\" is on rank ", rank_of_owner(p.spec.owner));
  for (const auto& [block, use] : p.uses)
    if (block < static_cast<int>(last_sums_.size()) && last_sums_[block].has_value() && last_touched_[block][use])
      return state_->memory().view(
          *last_sums_[block], state_->layout[block].sums[use] * static_cast<int64_t>(c10::elementSize(state_->wide())),
          p.spec.shape, state_->wide());
  fail("INVALID_ARGUMENT", "[session] the last step left no gradient of \"", name,
       "\" (only tapes that update at the end keep them)");
}

}  // namespace stroma::engine
