#include "engine/kept.h"

#include <ATen/Functions.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/library.h>

#include <limits>
#include <mutex>
#include <unordered_set>

#include "engine/error.h"
#include "engine/program.h"

namespace stroma::engine {
namespace {

thread_local Keeper* under_way = nullptr;

std::pair<std::string, std::string> split(const std::string& op) {
  const size_t colons = op.find("::");
  const size_t dot = colons == std::string::npos ? std::string::npos : op.find('.', colons + 2);
  return {op.substr(0, dot), dot == std::string::npos ? "" : op.substr(dot + 1)};
}

// The same memory and version counter, none of autograd's own: a reference that holds no graph.
at::Tensor bare(const at::Tensor& value) {
  return at::Tensor(value.unsafeGetTensorImpl()->shallow_copy_and_detach(value.unsafeGetTensorImpl()->version_counter(),
                                                                         /*allow_tensor_metadata_change=*/true));
}

// Shape and dtype without content: not-a-number, so that whoever reads it against the plan shows.
at::Tensor hollow(const at::Tensor& value) {
  return bare(at::full({}, std::numeric_limits<double>::quiet_NaN(), value.options().requires_grad(false))
                  .expand(value.sizes()));
}

}  // namespace

// Gives an operator the kernel below autograd, once in a process: it stays, and costs a call that nobody keeps its
// boxing.
void cover(const c10::OperatorHandle& op) {
  static std::mutex mutex;
  static std::unordered_set<c10::OperatorName> covered;
  // Never taken back: operators may be called until the process ends.
  static auto* libraries = new std::vector<torch::Library>();
  const std::lock_guard lock(mutex);
  const c10::OperatorName& name = op.operator_name();
  if (!covered.insert(name).second) return;
  const size_t colons = name.name.find("::");
  libraries->emplace_back(torch::Library::IMPL, name.name.substr(0, colons), c10::DispatchKey::ADInplaceOrView,
                          __FILE__, __LINE__);
  const std::string local = name.name.substr(colons + 2);
  libraries->back().impl((name.overload_name.empty() ? local : local + "." + name.overload_name).c_str(),
                         torch::CppFunction::makeFromBoxedFunction<&Keeper::intercept>());
}

Selection select(const KeptValues& kept, const std::vector<Program>& programs) {
  std::map<std::string, std::vector<c10::OperatorHandle>> kernels;
  for (const auto& [op, names] : kept.kernels) {
    for (const std::string& name : names) {
      const auto found = c10::Dispatcher::singleton().findSchema([&] {
        const auto [base, overload] = split(name);
        return c10::OperatorName(base, overload);
      }());
      if (!found.has_value()) fail("TAPE", "[tape] the dispatcher has no operator ", name, " whose result to keep");
      bool writes = found->schema().is_mutable();
      for (const auto& result : found->schema().returns()) writes = writes || result.alias_info() != nullptr;
      if (writes) fail("TAPE", "[tape] results of ", name, " are its arguments: they cannot be kept");
      cover(*found);
      kernels[op].push_back(*found);
    }
  }
  if (kept.values.size() != programs.size() || kept.shapes.size() != programs.size())
    fail("TAPE", "[tape] expected kept values of ", programs.size(), " programs, got ", kept.values.size(), " and ",
         kept.shapes.size());
  Selection selection(programs.size());
  for (size_t p = 0; p < programs.size(); ++p) {
    const ProgramSpec& spec = programs[p].spec();
    const auto mark = [&](const std::vector<int>& values, KeptCall::What what) {
      for (const int value : values) {
        size_t n = 0;
        while (n < spec.nodes.size() && (spec.nodes[n].outputs.size() != 1 || spec.nodes[n].outputs[0] != value)) ++n;
        const auto found = n < spec.nodes.size() ? kernels.find(spec.nodes[n].op) : kernels.end();
        if (found == kernels.end())
          fail("TAPE", "[tape] value ", value, " of program ", spec.name, " is of no operator whose results are kept");
        selection[p].resize(spec.nodes.size());
        selection[p][n] = {what, found->second};
      }
    };
    mark(kept.values[p], KeptCall::What::kResult);
    mark(kept.shapes[p], KeptCall::What::kShape);
  }
  return selection;
}

Keeper::Keeper(Mode mode, const std::vector<KeptCall>& calls, KeptResults& results)
    : mode_(mode), calls_(calls), results_(results) {
  if (mode_ == Mode::kKeep) results_.nodes.resize(calls_.size());
}

Keeper::~Keeper() {
  if (under_way == this) under_way = nullptr;
}

void Keeper::begin(size_t node) {
  node_ = node;
  next_ = 0;
  const bool kept = calls_[node].what != KeptCall::What::kNothing;
  if (kept && mode_ == Mode::kKeep) results_.nodes[node].emplace();
  call_ = kept && results_.nodes[node].has_value() ? &calls_[node] : nullptr;
  under_way = call_ == nullptr ? nullptr : this;
}

void Keeper::end(size_t node, const at::Tensor& output) {
  under_way = nullptr;
  if (call_ == nullptr) return;
  call_ = nullptr;
  auto& results = results_.nodes[node];
  if (mode_ == Mode::kReplay) {
    if (next_ != results->size())
      fail("NATIVE", "[recompute] a call took up ", next_, " of ", results->size(), " kept results, at node ", node);
    results->clear();
    return;
  }
  // What the call went on to change is not what its kernel returned.
  bool changed = output._version() != 0;
  for (const auto& result : *results)
    for (const c10::IValue& value : result.values)
      changed = changed || (value.isTensor() && value.toTensor()._version());
  if (changed) {
    results.reset();
    return;
  }
  if (calls_[node].what != KeptCall::What::kShape) return;
  for (auto& result : *results)
    for (c10::IValue& value : result.values)
      if (value.isTensor() && value.toTensor().is_floating_point()) value = hollow(value.toTensor());
}

at::Tensor Keeper::cut(at::Tensor value) const {
  if (mode_ != Mode::kKeep || !value.defined()) return value;
  // The same flag as in the replay: operators choose their kernels by it.
  at::Tensor alone = bare(value);
  return value.requires_grad() ? alone.set_requires_grad(true) : alone;
}

bool Keeper::concerns(const c10::OperatorHandle& op) const {
  for (const c10::OperatorHandle& kernel : call_->kernels)
    if (kernel == op) return true;
  return false;
}

void Keeper::keep(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const size_t count = op.schema().returns().size();
  KeptResults::Result result{op, {}};
  for (size_t i = stack.size() - count; i < stack.size(); ++i)
    result.values.push_back(
        stack[i].isTensor() && stack[i].toTensor().defined() ? c10::IValue(bare(stack[i].toTensor())) : stack[i]);
  results_.nodes[node_]->push_back(std::move(result));
}

bool Keeper::hand_over(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  auto& results = *results_.nodes[node_];
  if (next_ >= results.size() || !(results[next_].op == op))
    fail("NATIVE", "[recompute] ", op.operator_name().name, " ran in the backward and not in the forward, at node ",
         node_);
  torch::jit::drop(stack, op.schema().arguments().size());
  for (c10::IValue& value : results[next_].values) stack.push_back(std::move(value));
  ++next_;
  return true;
}

void Keeper::intercept(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  Keeper* keeper = under_way;
  const bool kept = keeper != nullptr && keeper->concerns(op);
  if (kept && keeper->mode_ == Mode::kReplay && keeper->hand_over(op, *stack)) return;
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(keys & c10::after_ADInplaceOrView_keyset, stack);
  }
  if (kept) keeper->keep(op, *stack);
}

}  // namespace stroma::engine
