// Blocks forward and backward: tensors over places in, autograd inside one block, gradients into places as they appear.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "engine/error.h"
#include "engine/step.h"
#include "kernels/unit_seed.h"

namespace stroma::engine {
namespace {

// Takes a leaf's gradient the moment autograd has it whole, so that a block's gradients never all live at once.
class TakeGradient final : public torch::autograd::PostAccumulateGradHook {
 public:
  explicit TakeGradient(std::function<void(const at::Tensor&)> take) : take_(std::move(take)) {}
  void operator()(const torch::autograd::Variable& leaf) override {
    const at::NoGradGuard no_grad;
    take_(leaf.grad());
    leaf.mutable_grad().reset();
  }

 private:
  std::function<void(const at::Tensor&)> take_;
};

void on_gradient(const at::Tensor& leaf, std::function<void(const at::Tensor&)> take) {
  torch::autograd::impl::set_post_acc_grad_hooks(leaf, std::make_unique<TakeGradient>(std::move(take)));
}

}  // namespace

const Place& Executor::place(const Step& step, int index, const char* what) const {
  if (index < 0 || index >= static_cast<int>(step.tape.places.size())) fail("TAPE", "[tape] ", what, " has no place");
  return step.tape.places[index];
}

// Boundary output of a block for a micro-batch, or its gradient: what the place holds.
at::Tensor Executor::boundary(Step& step, int index, int micro_batch, int block, int output,
                              at::ScalarType dtype) const {
  const Place& at = place(step, index, "a boundary");
  if (at.space == Space::kSlot) {
    const at::Tensor& held = step.slots[at.offset];
    if (!held.defined()) fail("TAPE", "[tape] slot ", at.offset, " is read and holds nothing");
    return held;
  }
  const auto& by_output = step.shapes[micro_batch][block];
  if (output >= static_cast<int>(by_output.size()))
    fail("TAPE", "[tape] a boundary of ", train_->graph.blocks[block].name, " is read before its forward");
  return state_->memory().view(at, 0, by_output[output], dtype);
}

void Executor::put(Step& step, int index, const at::Tensor& value) const {
  const Place& at = place(step, index, "a boundary");
  if (at.space == Space::kSlot)
    step.slots[at.offset] = value.detach().contiguous();
  else
    state_->memory().view(at, 0, value.sizes(), value.scalar_type()).copy_(value.detach());
}

// Leaves over the places of the block's parameters, fresh for each pass.
std::vector<at::Tensor> Executor::parameters_at(const Step& step, const Instruction& at) const {
  const auto& owners = train_->owners[at.block];
  if (at.params.size() != owners.size())
    fail("TAPE", "[tape] expected ", owners.size(), " places of parameters of ", train_->graph.blocks[at.block].name,
         ", got ", at.params.size());
  const int64_t itemsize = static_cast<int64_t>(c10::elementSize(spec_.dtype));
  std::vector<at::Tensor> leaves;
  for (const int index : train_->parameters[at.block]) {
    const Parameter& p = state_->parameters[index];
    const size_t owner = std::find(owners.begin(), owners.end(), p.spec.owner) - owners.begin();
    at::Tensor leaf = state_->memory().view(place(step, at.params[owner], "parameters"), p.offset * itemsize,
                                            p.spec.shape, spec_.dtype);
    if (p.spec.trainable) leaf.set_requires_grad(true);
    leaves.push_back(std::move(leaf));
  }
  return leaves;
}

std::vector<at::Tensor> Executor::run_block(const LoadedGraph& loaded, int block, std::vector<at::Tensor> inputs,
                                            const std::vector<at::Tensor>& parameters, const DimValues& dims,
                                            Keeper* keeper) const {
  const Program& program = loaded.programs[loaded.graph.blocks[block].program];
  std::vector<at::Tensor> values = std::move(inputs);
  values.reserve(program.spec().values);
  values.insert(values.end(), parameters.begin(), parameters.end());
  values.resize(program.spec().values);
  try {
    program.run(values, loaded.graph.dims, dims, keeper);
  } catch (const c10::OutOfMemoryError&) {
    throw;  // the walk knows what else is held
  } catch (const c10::Error& error) {
    if (spec_.ranks && !spec_.ranks->lost().empty()) fail("RANKS", spec_.ranks->lost());
    fail("NATIVE", "[block ", loaded.graph.blocks[block].name, "] ", error.what_without_backtrace());
  }
  std::vector<at::Tensor> outputs;
  for (const ProgramOutput& output : program.spec().outputs) outputs.push_back(values[output.value]);
  return outputs;
}

std::vector<at::Tensor> Executor::block_inputs(Step& step, const Instruction& at) const {
  const BlockSpec& block = train_->graph.blocks[at.block];
  const auto& specs = train_->programs[block.program].spec().inputs;
  if (at.in.size() != specs.size()) fail("TAPE", "[tape] block ", block.name, " has ", specs.size(), " inputs");
  const Batch& batch = step.batches[at.micro_batch];
  std::vector<at::Tensor> inputs;
  for (size_t i = 0; i < specs.size(); ++i) {
    switch (specs[i].kind) {
      case ProgramInput::Kind::kBoundary: {
        const Source& source = block.inputs[i];
        at::Tensor leaf =
            boundary(step, at.in[i], at.micro_batch, source.block, source.output, specs[i].dtype).detach();
        // The same flag with and without autograd: at::matmul chooses its kernel by it.
        if (specs[i].grad) leaf.set_requires_grad(true);
        inputs.push_back(std::move(leaf));
        break;
      }
      case ProgramInput::Kind::kBatch: {
        const auto it = batch.find(block.inputs[i].name);
        if (it == batch.end())
          fail("INVALID_ARGUMENT", "[session] the batch has no input \"", block.inputs[i].name, "\"");
        inputs.push_back(it->second);
        break;
      }
      case ProgramInput::Kind::kLossScale: {
        const int64_t count = step.counts[loss_named(train_->graph, block.inputs[i].name)];
        inputs.push_back(
            at::scalar_tensor(1.0 / static_cast<double>(count), at::dtype(specs[i].dtype).device(spec_.device)));
        break;
      }
      case ProgramInput::Kind::kRngKey: {
        at::Tensor key = at::empty({4}, at::kLong);
        int64_t* k = key.mutable_data_ptr<int64_t>();
        k[0] = step.request.seed;
        k[1] = step.request.step;
        // Shares of one row draw each for itself.
        k[2] = at.micro_batch + place_in_context() * step.tape.micro_batches;
        k[3] = at.block;
        inputs.push_back(std::move(key));
        break;
      }
    }
  }
  return inputs;
}

Executor::Run Executor::forward_of(const Step& step, const Instruction& at) const {
  if (!at.keep) return Run::kPlain;
  if (!step.tape.kept.has_value()) return Run::kGraph;
  return selection_[train_->graph.blocks[at.block].program].empty() ? Run::kPlain : Run::kKeep;
}

// results: what a replay hands over.
Executor::Kept Executor::forward(Step& step, const Instruction& at, Run how, KeptResults results) {
  const at::AutoGradMode mode(how != Run::kPlain);
  Kept ran;
  ran.inputs = block_inputs(step, at);
  ran.parameters = parameters_at(step, at);
  std::optional<Keeper> keeper;
  if (how == Run::kKeep || how == Run::kReplay)
    keeper.emplace(how == Run::kKeep ? Keeper::Mode::kKeep : Keeper::Mode::kReplay,
                   selection_[train_->graph.blocks[at.block].program], results);
  ran.outputs = run_block(*train_, at.block, ran.inputs, ran.parameters, step.dims[at.micro_batch],
                          keeper.has_value() ? &*keeper : nullptr);
  if (how == Run::kKeep) ran.results = std::move(results);
  auto& shapes = step.shapes[at.micro_batch][at.block];
  if (shapes.empty())
    for (const at::Tensor& output : ran.outputs) shapes.push_back(output.sizes().vec());
  return ran;
}

void Executor::record_loss(Step& step, const Instruction& at, const Kept& ran) {
  for (size_t o = 0; o < ran.outputs.size(); ++o) {
    const int term = loss_of(train_->graph, at.block, static_cast<int>(o));
    if (term < 0) continue;
    step.unread.push_back({term, at.micro_batch, ran.outputs[o].detach()});
  }
  if (!spec_.reads_late) read_losses(step);
}

// All that were computed since the last time, in one wait. The first that is not finite ends the step, as if those
// after it had not run.
void Executor::read_losses(Step& step) {
  if (step.unread.empty()) return;
  const auto unread = std::exchange(step.unread, {});
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> losses;
  for (const Step::Unread& each : unread) losses.push_back(each.loss.to(at::kDouble).view({1}));
  const at::Tensor values = at::cat(losses).to(at::kCPU);
  for (size_t i = 0; i < unread.size(); ++i) {
    const double value = values.const_data_ptr<double>()[i];
    step.losses[unread[i].term][unread[i].micro_batch] = value;
    if (std::isfinite(value)) continue;
    if (step.result.finite) {
      step.result.finite = false;
      step.result.non_finite_micro_batch = unread[i].micro_batch;
      step.result.non_finite_loss = value;
    }
    if (in_step(step)) continue;
    step.dead = true;
    return;
  }
}

// In the order of terms and micro-batches, whichever ran first and wherever.
void Executor::total_losses(Step& step) const {
  for (size_t term = 0; term < step.losses.size(); ++term)
    for (size_t m = 0; m < step.losses[term].size(); ++m) {
      if (!step.losses[term][m].has_value()) continue;
      const double value = *step.losses[term][m], weighted = value * train_->graph.losses[term].weight;
      step.result.losses[term] += value;
      step.result.loss += weighted;
      const int64_t count = step.micro_counts[m][term];
      if (count > 0)
        step.result.micro_batch_losses[m] +=
            weighted * static_cast<double>(step.counts[term]) / static_cast<double>(count);
    }
}

void Executor::store_outputs(Step& step, const Instruction& at, const Kept& ran) {
  if (at.out.size() != ran.outputs.size())
    fail("TAPE", "[tape] block ", train_->graph.blocks[at.block].name, " has ", ran.outputs.size(), " outputs");
  const at::NoGradGuard no_grad;
  for (size_t o = 0; o < ran.outputs.size(); ++o)
    if (at.out[o] >= 0) put(step, at.out[o], ran.outputs[o]);
}

// Gradients of the block's outputs -> its sums and the gradients of its inputs.
void Executor::backward(Step& step, const Instruction& at, const Kept& ran) {
  const BlockSpec& block = train_->graph.blocks[at.block];
  const auto& specs = train_->programs[block.program].spec();
  std::vector<at::Tensor> outputs, seeds;
  UnitSeeds ones;
  for (size_t o = 0; o < ran.outputs.size(); ++o) {
    const at::Tensor& y = ran.outputs[o];
    if (!y.requires_grad()) continue;
    const int term = loss_of(train_->graph, at.block, static_cast<int>(o));
    if (term >= 0) {
      outputs.push_back(y);
      const double weight = train_->graph.losses[term].weight;
      seeds.push_back(at::scalar_tensor(weight, y.options().requires_grad(false)));
      if (weight == 1) ones.add(seeds.back());
    } else if (o < at.d_out.size() && at.d_out[o] >= 0) {
      outputs.push_back(y);
      seeds.push_back(boundary(step, at.d_out[o], at.micro_batch, at.block, static_cast<int>(o), y.scalar_type()));
    }
  }
  const std::vector<int64_t>& sums = state_->layout[at.block].sums;
  for (size_t i = 0; i < sums.size(); ++i) {
    if (sums[i] < 0) continue;
    const at::Tensor& leaf = ran.parameters[i];
    at::Tensor sum = state_->memory().view(place(step, at.sums.at(0), "sums"),
                                           sums[i] * static_cast<int64_t>(c10::elementSize(state_->wide())),
                                           leaf.sizes(), state_->wide());
    // Another stage gets these sums, and must know where no gradient came.
    if (at.first && borrowed(at.block, static_cast<int>(i))) mark_untouched(sum);
    char* touched = &step.touched[at.block][i];
    on_gradient(leaf, [sum, touched](const at::Tensor& gradient) {
      // The first one overwrites: nothing is ever zeroed.
      if (*touched)
        sum.add_(gradient);
      else
        sum.copy_(gradient);
      *touched = 1;
    });
  }
  std::vector<char> arrived(at.d_in.size(), 0);
  for (size_t i = 0; i < at.d_in.size(); ++i) {
    if (at.d_in[i] < 0) continue;
    const at::Tensor& x = ran.inputs[i];
    char* here = &arrived[i];
    const int index = at.d_in[i];
    on_gradient(x, [this, &step, index, here](const at::Tensor& gradient) {
      put(step, index, gradient);
      *here = 1;
    });
    // A partial sum of later blocks enters first, as a gradient of the boundary itself: autograd's own order.
    if (i < at.add.size() && at.add[i]) {
      const Source& source = block.inputs[i];
      outputs.push_back(x);
      seeds.push_back(boundary(step, index, at.micro_batch, source.block, source.output, specs.inputs[i].dtype));
    }
  }
  if (!outputs.empty()) {
    const at::AutoGradMode mode(true);
    torch::autograd::backward(outputs, seeds);
  }
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < at.d_in.size(); ++i)
    if (at.d_in[i] >= 0 && !arrived[i])
      put(step, at.d_in[i], at::zeros_like(ran.inputs[i], ran.inputs[i].options().requires_grad(false)));
}

}  // namespace stroma::engine
