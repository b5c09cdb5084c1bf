// From gradient sums to new parameters: tied uses, norms, the closed record of a step, retained gradients, the update.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <cmath>

#include "engine/error.h"
#include "engine/step.h"

namespace stroma::engine {
namespace {

// PyTorch's clip_grad_norm_, operation for operation, in the dtype of the norms; its Python divides a number by a
// tensor, which is a multiplication by the reciprocal.
double clip_coefficient(const at::Tensor& total, double max_norm) {
  return at::clamp_max(at::reciprocal(total + 1e-6) * max_norm, 1.0).item<double>();
}

at::ScalarType dtype_of(RetainedDType dtype) {
  switch (dtype) {
    case RetainedDType::kFloat32:
      return at::kFloat;
    case RetainedDType::kFloat64:
      return at::kDouble;
    case RetainedDType::kBFloat16:
      return at::kBFloat16;
    default:
      return at::kByte;
  }
}

template <typename Signature>
auto kernel(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

int64_t scales(int64_t elements) { return (elements + kAlignElements - 1) / kAlignElements; }

}  // namespace

// With shards, of this rank's: `to` is then its part of the computing copy.
void Executor::cast(Step& step, const Instruction& at) {
  const at::NoGradGuard no_grad;
  const Place &from = place(step, at.from, "parameters"), &to = place(step, at.to, "the computing copy");
  const int64_t n = std::min(to.bytes / static_cast<int64_t>(c10::elementSize(spec_.dtype)),
                             from.bytes / static_cast<int64_t>(c10::elementSize(state_->format().storage)));
  const Memory& memory = state_->memory();
  memory.view(to, 0, {n}, spec_.dtype).copy_(memory.view(from, 0, {n}, state_->format().storage));
}

// Whether a micro-batch of this rank reached the parameter. Which ones are reached is the graph's doing, so it is the
// same on all members of a stage.
bool Executor::reached(const Step& step, const Parameter& p) const {
  return std::any_of(p.uses.begin(), p.uses.end(),
                     [&](const auto& use) { return step.touched[use.first][use.second]; });
}

bool Executor::borrowed(int block, int use) const {
  const Parameter& p = state_->parameters[train_->parameters[block][use]];
  return !state_->placement().is_mine(p.spec.owner);
}

// All ones: a not-a-number that no arithmetic makes, where a gradient's first element would be.
void Executor::mark_untouched(const at::Tensor& sum) const {
  const at::NoGradGuard no_grad;
  if (sum.numel() > 0) sum.view({-1}).narrow(0, 0, 1).view(at::kByte).fill_(255);
}

// What other stages have sent of their own uses of a block's parameters, before all are added: which of them a gradient
// reached.
void Executor::hear_of_uses(Step& step, const Instruction& at) const {
  const std::vector<int> users = users_of(at.block);
  for (size_t k = 0; k < users.size() && k < at.sums.size(); ++k) {
    const int user = users[k];
    if (state_->placement().is_mine(user)) continue;
    const auto& used = train_->parameters[user];
    for (size_t i = 0; i < used.size(); ++i) {
      const Parameter& p = state_->parameters[used[i]];
      const int64_t offset = state_->layout[user].sums[i], itemsize = c10::elementSize(state_->wide());
      if (p.spec.owner != at.block || offset < 0) continue;
      const at::Tensor first =
          state_->memory().view(place(step, at.sums[k], "sums"), offset * itemsize, {itemsize}, at::kByte);
      step.touched[user][i] = !first.eq(255).all().item<bool>();
    }
  }
}

// The gradient of this rank's micro-batches, as wide as it travels. In place where sums have its layout.
void Executor::partial(Step& step, const Instruction& at) {
  const at::NoGradGuard no_grad;
  hear_of_uses(step, at);
  const Place& to = place(step, at.to, "the partial gradient");
  const at::ScalarType dtype = dtype_of(at.dtype);
  for (const TensorLayout& t : state_->layout[at.block].owned) {
    const Parameter& p = state_->parameters[t.parameter];
    if (!p.spec.trainable) continue;
    const at::Tensor total = user_sums(step, at, p, /*form=*/true);
    const at::Tensor value =
        state_->memory().view(to, t.param * static_cast<int64_t>(c10::elementSize(dtype)), p.spec.shape, dtype);
    if (!total.defined())
      value.zero_();
    else if (total.const_data_ptr() != value.const_data_ptr())
      value.copy_(total);
  }
}

// In the order of the members, whatever arrived first.
void Executor::reduce(Step& step, const Instruction& at) {
  const at::NoGradGuard no_grad;
  const Place& to = place(step, at.to, "the reduced gradient");
  const int64_t n = to.bytes / static_cast<int64_t>(c10::elementSize(state_->wide()));
  const at::Tensor total = state_->memory().view(to, 0, {n}, state_->wide());
  for (size_t k = 0; k < at.sums.size(); ++k) {
    const Place& from = place(step, at.sums[k], "a part of the gradient");
    const at::ScalarType dtype = dtype_of(at.dtype);
    if (from.bytes != n * static_cast<int64_t>(c10::elementSize(dtype)))
      fail("TAPE", "[tape] a part of the gradient of ", train_->graph.blocks[at.block].name, " has another size");
    const at::Tensor part = state_->memory().view(from, 0, {n}, dtype);
    if (k == 0)
      total.copy_(part);
    else
      total.add_(part);
  }
}

// The sum of a parameter's gradients once `norm` has formed it: it lies in the first use that was touched. sums holds
// places by user, in the order of the blocks. Undefined where no micro-batch reached the parameter.
at::Tensor Executor::summed(const Step& step, const Instruction& at, const Parameter& p, bool form) const {
  if (state_->placement().members() == 1) return user_sums(step, at, p, form);
  if (!reached(step, p)) return {};
  const BlockLayout& block = state_->layout[p.spec.owner];
  const Range mine = block.shard(block.trained, state_->placement().stages->shard());
  const int64_t offset = p.offset + p.layout.begin - mine.begin;
  return state_->memory().view(place(step, at.sums.at(0), "the reduced gradient"),
                               offset * static_cast<int64_t>(c10::elementSize(state_->wide())), {p.layout.elements},
                               state_->wide());
}

// The blocks that use a trainable parameter of this one, ascending. Those without a backward have no sums; the tape
// leaves them out.
std::vector<int> Executor::users_of(int owner) const {
  std::vector<int> users;
  for (const Parameter& p : state_->parameters)
    if (p.spec.owner == owner && p.spec.trainable)
      for (const auto& [block, use] : p.uses) users.push_back(block);
  std::sort(users.begin(), users.end());
  users.erase(std::unique(users.begin(), users.end()), users.end());
  std::erase_if(users, [&](int block) { return !train_->has_backward[block]; });
  return users;
}

at::Tensor Executor::user_sums(const Step& step, const Instruction& at, const Parameter& p, bool form) const {
  const std::vector<int> users = users_of(p.spec.owner);
  if (users.size() != at.sums.size())
    fail("TAPE", "[tape] expected the sums of ", users.size(), " users of ", train_->graph.blocks[p.spec.owner].name,
         ", got ", at.sums.size());
  const int64_t itemsize = static_cast<int64_t>(c10::elementSize(state_->wide()));
  at::Tensor total;
  for (const auto& [block, use] : p.uses) {
    if (!step.touched[block][use]) continue;
    const size_t user = std::find(users.begin(), users.end(), block) - users.begin();
    const at::Tensor sum =
        state_->memory().view(place(step, at.sums.at(user), "sums"), state_->layout[block].sums[use] * itemsize,
                              p.spec.shape, state_->wide());
    if (!total.defined())
      total = sum;
    else if (form)
      total.add_(sum);
    if (!form) break;
  }
  return total;
}

void Executor::norm(Step& step, const Instruction& at) {
  const at::NoGradGuard no_grad;
  if (state_->placement().members() == 1) hear_of_uses(step, at);
  for (const TensorLayout& t : state_->layout[at.block].trainable) {
    const at::Tensor total = summed(step, at, state_->parameters[t.parameter], /*form=*/true);
    if (total.defined()) step.norms[t.parameter] = step.own_norms[t.parameter] = at::linalg_vector_norm(total, 2);
  }
  const Placement& placement = state_->placement();
  if (placement.shards() > 1 && step.tape.update == UpdateOrder::kBackward) share_norms(step, at.block);
  if (step.tape.update != UpdateOrder::kEnd || placement.members() > 1) return;
  const std::vector<int> seen = users_of(at.block);
  for (size_t i = 0; i < seen.size() && i < at.sums.size(); ++i) last_sums_[seen[i]] = place(step, at.sums[i], "sums");
}

void Executor::coefficient(Step& step) {
  const at::NoGradGuard no_grad;
  if (spec_.ranks) {
    exchange(step);
    if (step.dead) return;
  }
  std::vector<at::Tensor> norms;
  for (const at::Tensor& n : step.norms)
    if (n.defined()) norms.push_back(n);
  step.closed = true;
  if (norms.empty()) return;
  const at::Tensor total = at::linalg_vector_norm(at::stack(norms), 2);
  step.result.grad_norm = total.item<double>();
  if (step.tape.clip == Clip::kGlobal && step.request.max_grad_norm.has_value())
    step.coefficient = clip_coefficient(total, *step.request.max_grad_norm);
  // Update on backward has no step to take back: its blocks were judged one by one.
  if (step.tape.update == UpdateOrder::kBackward) return;
  if (step.result.finite && !std::isfinite(step.result.grad_norm)) {
    step.result.finite = false;
    step.result.non_finite_loss = step.result.grad_norm;
    return;
  }
  if (step.tape.update == UpdateOrder::kForward) {
    step.next.valid = true;
    step.next.learning_rate = step.request.learning_rate;
    step.next.coefficient = step.coefficient;
    step.next.seed = step.request.seed;
    if (step.tape.clip == Clip::kBlock && step.request.max_grad_norm.has_value())
      for (size_t b = 0; b < state_->layout.size(); ++b)
        step.next.block_coefficients.push_back(block_coefficient(step, static_cast<int>(b)));
  }
}

// Of a block's own norm; 1 where nothing is clipped by block, NaN where the norm is not finite.
double Executor::block_coefficient(const Step& step, int block) const {
  std::vector<at::Tensor> norms;
  for (const TensorLayout& t : state_->layout[block].owned)
    if (step.norms[t.parameter].defined()) norms.push_back(step.norms[t.parameter]);
  if (norms.empty()) return 1;
  const at::Tensor total = at::linalg_vector_norm(at::stack(norms), 2);
  if (!std::isfinite(total.item<double>())) return std::nan("");
  if (step.tape.clip != Clip::kBlock || !step.request.max_grad_norm.has_value()) return 1;
  return clip_coefficient(total, *step.request.max_grad_norm);
}

void Executor::pack(Step& step, const Instruction& at) {
  const at::NoGradGuard no_grad;
  static const auto quantize =
      kernel<void(const at::Tensor&, at::Tensor&, at::Tensor&, bool)>("stroma::quantize_blockwise_");
  const BlockLayout& block = state_->layout[at.block];
  const RetainedLayout to = layout_retained(block, at.dtype);
  const Place& target = place(step, at.to, "the retained gradient");
  for (size_t i = 0; i < block.trainable.size(); ++i) {
    const TensorLayout& t = block.trainable[i];
    const Parameter& p = state_->parameters[t.parameter];
    const at::Tensor total = summed(step, at, p, /*form=*/false);
    step.next.touched[t.parameter] = total.defined();
    if (!total.defined()) continue;
    at::Tensor value = state_->memory().view(target, to.value[i], total.sizes(), dtype_of(at.dtype));
    if (at.dtype != RetainedDType::kDynamic8) {
      value.copy_(total);
      continue;
    }
    at::Tensor absmax = state_->memory().view(target, to.absmax[i], {scales(t.elements)}, at::kFloat);
    quantize.call(total, value, absmax, /*signed=*/true);
  }
}

void Executor::update(Step& step, const Instruction& at) {
  const at::NoGradGuard no_grad;
  if (at.retained && !pending_.valid) return;
  if (!at.retained && step.tape.clip == Clip::kGlobal && !step.closed)
    fail("TAPE", "[tape] an update stands before the coefficient");
  static const auto adamw =
      kernel<void(at::Tensor&, const std::optional<at::Tensor>&, const at::Tensor&, at::Tensor&, at::Tensor&,
                  const std::optional<at::Tensor>&, const std::optional<at::Tensor>&, double, double, double, double,
                  double, int64_t, double, at::IntArrayRef)>("stroma::adamw_");
  static const auto dequantize =
      kernel<void(const at::Tensor&, const at::Tensor&, bool, at::Tensor&)>("stroma::dequantize_blockwise_");
  const BlockLayout& block = state_->layout[at.block];
  const Memory& memory = state_->memory();
  const Place &param = place(step, at.param, "parameters"), &state = place(step, at.state, "optimizer state");
  double coefficient = at.retained ? pending_.coefficient : step.coefficient;
  if (at.retained && !pending_.block_coefficients.empty()) coefficient = pending_.block_coefficients[at.block];
  if (!at.retained && step.tape.update == UpdateOrder::kBackward) {
    coefficient = block_coefficient(step, at.block);
    if (std::isnan(coefficient)) {
      step.result.skipped_blocks.push_back(at.block);
      return;
    }
  } else if (!at.retained && step.tape.clip == Clip::kBlock) {
    coefficient = block_coefficient(step, at.block);
  }
  const double learning_rate = at.retained ? pending_.learning_rate : step.request.learning_rate;
  const int64_t seed = at.retained ? pending_.seed : step.request.seed;
  const RetainedLayout retained = at.retained ? layout_retained(block, at.dtype) : RetainedLayout{};
  const at::ScalarType storage = state_->format().storage;
  for (size_t i = 0; i < block.trainable.size(); ++i) {
    const TensorLayout& t = block.trainable[i];
    Parameter& p = state_->parameters[t.parameter];
    at::Tensor gradient;
    if (at.retained) {
      if (!pending_.touched[t.parameter]) continue;
      pending_.touched[t.parameter] = 0;
      const Place& from = place(step, at.sums.at(0), "the retained gradient");
      gradient = memory.view(from, retained.value[i], {t.elements}, dtype_of(at.dtype));
      if (at.dtype == RetainedDType::kDynamic8) {
        const at::Tensor absmax = memory.view(from, retained.absmax[i], {scales(t.elements)}, at::kFloat);
        at::Tensor wide = at::empty({t.elements}, gradient.options().dtype(at::kFloat));
        dequantize.call(gradient, absmax, /*signed=*/true, wide);
        gradient = wide;
      }
    } else {
      gradient = summed(step, at, p, /*form=*/false);
      if (!gradient.defined()) continue;  // no micro-batch reached it: like PyTorch, no decay either
      gradient = gradient.view({t.elements});
      step.committed = true;
    }
    ++p.updates;
    at::Tensor value =
        memory.view(param, t.param * static_cast<int64_t>(c10::elementSize(storage)), {t.elements}, storage);
    std::optional<at::Tensor> master, absmax1, absmax2;
    if (t.master >= 0)
      master = memory.view(state, t.master, {t.elements},
                           state_->format().master == MasterWeight::kFloat32 ? at::kFloat : at::kShort);
    const at::ScalarType moments = t.quantized ? at::kByte : state_->wide();
    at::Tensor first = memory.view(state, t.first, {t.elements}, moments);
    at::Tensor second = memory.view(state, t.second, {t.elements}, moments);
    if (t.quantized) {
      absmax1 = memory.view(state, t.absmax1, {scales(t.elements)}, at::kFloat);
      absmax2 = memory.view(state, t.absmax2, {scales(t.elements)}, at::kFloat);
    }
    const AdamW& o = spec_.optimizer;
    const int64_t key[4] = {seed, p.updates, t.parameter, t.begin};
    adamw.call(value, master, gradient, first, second, absmax1, absmax2, learning_rate, o.beta1, o.beta2, o.epsilon,
               p.spec.decay ? o.weight_decay : 0.0, p.updates, coefficient, key);
  }
}

}  // namespace stroma::engine
