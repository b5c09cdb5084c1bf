// What ranks tell each other in a step: losses, norms and failures (all ranks then decide alike), and the parts of
// a block that they hold.
#include <ATen/Functions.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "engine/error.h"
#include "engine/step.h"

namespace stroma::engine {
namespace {

// Plain little-endian fields one after the other; both ends are this function's own build (ranks check that they are).
class Message {
 public:
  Message() = default;
  explicit Message(std::string text) : text_(std::move(text)) {}
  template <typename T>
  void put(const T& value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put(const std::string& value) {
    put(value.size());
    text_ += value;
  }
  template <typename T>
  T take() {
    T value;
    need(sizeof value);
    std::memcpy(&value, text_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  std::string take_text() {
    const size_t n = take<size_t>();
    need(n);
    at_ += n;
    return text_.substr(at_ - n, n);
  }
  const std::string& text() const { return text_; }

 private:
  void need(size_t n) const {
    if (n > text_.size() - at_) fail("RANKS", "[ranks] a rank sent a message of no sense");
  }
  std::string text_;
  size_t at_ = 0;
};

// What an exception says, with the code that the binding tells it by.
std::pair<std::string, std::string> told(const std::exception_ptr& failure) {
  if (failure == nullptr) return {};
  try {
    std::rethrow_exception(failure);
  } catch (const Error& error) {
    return {error.code, error.what()};
  } catch (const std::exception& error) {
    return {"NATIVE", error.what()};
  }
}

// Codes are literals of this program: those that another rank may send.
const char* code_of(const std::string& text) {
  for (const char* code : {"OUT_OF_MEMORY", "TAPE", "DATA", "SHAPE", "GRAPH", "DISK_FULL", "INVALID_ARGUMENT"})
    if (text == code) return code;
  return "NATIVE";
}

}  // namespace

int64_t Executor::place_in_context() const {
  const auto& context = spec_.context;
  if (context.empty()) return 0;
  return std::find(context.begin(), context.end(), spec_.ranks->spec().rank) - context.begin();
}

// Ranks that share rows meet inside their passes, so until they have agreed each must run all of them: the others would
// wait for what it left out. A loss that is not finite, or a cancelled step, is then carried on to where they agree.
bool Executor::in_step(const Step& step) const { return spec_.context.size() > 1 && !step.agreed; }

// A pass that failed cannot be carried on: all end, with this rank's reason.
void Executor::end_others(const Step& step) const {
  if (spec_.ranks->lost().empty()) spec_.ranks->fail(told(step.failure).second);
}

// Tells the others how this rank fares; nobody waits.
void Executor::report(Step& step) {
  StepResult& result = step.result;
  Message mine;
  mine.put(step.agreed);
  if (!step.agreed) {
    const auto [code, text] = told(step.failure);
    mine.put(code);
    mine.put(text);
    mine.put(step.aborted);
    mine.put(result.finite);
    mine.put(result.non_finite_micro_batch);
    mine.put(result.non_finite_loss);
    for (const auto& by_micro_batch : step.losses)
      for (const std::optional<double>& loss : by_micro_batch) {
        mine.put(loss.has_value());
        mine.put(loss.value_or(0));
      }
    for (const auto& by_term : step.micro_counts)
      for (const int64_t count : by_term) mine.put(count);
  }
  for (const at::Tensor& norm : step.own_norms) {
    mine.put(norm.defined());
    mine.put(norm.defined() ? norm.item<double>() : 0.0);
  }
  step.reported = spec_.ranks->begin_gather(Ranks::Channel::kEngine, mine.text());
}

// Afterwards losses are those of all ranks, norms those of all parameters, and all ranks are dead or none is. The first
// exchange of a step settles losses and failures; a later one (update on backward: at its end) only norms.
void Executor::exchange(Step& step) {
  StepResult& result = step.result;
  if (!step.reported) report(step);
  const std::vector<std::string> all = step.reported();
  step.reported = nullptr;
  const bool first = !step.agreed;
  // None where rows alone are shared: each rank then has a norm of everything, and keeps it.
  const std::optional<Stages>& stages = state_->placement().stages;
  std::vector<std::vector<at::Tensor>> norms(step.norms.size());
  if (first) {
    result.finite = true;
    result.non_finite_micro_batch = -1;
  }
  // Ranks that share rows each have a part of every loss and of what it counts: summed in the order of ranks.
  const bool parts = first && spec_.context.size() > 1;
  if (parts) {
    for (auto& by_micro_batch : step.losses) by_micro_batch.assign(by_micro_batch.size(), std::nullopt);
    for (auto& by_term : step.micro_counts) by_term.assign(by_term.size(), 0);
  }
  for (size_t r = 0; r < all.size(); ++r) {
    Message theirs(all[r]);
    if (theirs.take<bool>() == first) fail("RANKS", "[ranks] rank ", r, " is at another place of its tape");
    if (first) {
      const std::string code = theirs.take_text(), text = theirs.take_text();
      if (!code.empty() && step.failure == nullptr)
        step.failure =
            std::make_exception_ptr(Error(code_of(code), "[ranks] rank " + std::to_string(r) + " failed: " + text));
      step.aborted |= theirs.take<bool>();
      const bool finite = theirs.take<bool>();
      const int micro_batch = theirs.take<int>();
      const double value = theirs.take<double>();
      if (!finite && (result.finite || (micro_batch >= 0 && micro_batch < result.non_finite_micro_batch))) {
        result.finite = false;
        result.non_finite_micro_batch = micro_batch;
        result.non_finite_loss = value;
      }
      for (auto& by_micro_batch : step.losses)
        for (std::optional<double>& loss : by_micro_batch) {
          const bool known = theirs.take<bool>();
          const double value = theirs.take<double>();
          if (known) loss = parts ? loss.value_or(0) + value : value;
        }
      for (size_t m = 0; m < step.micro_counts.size(); ++m)
        for (int64_t& count : step.micro_counts[m]) {
          const int64_t value = theirs.take<int64_t>();
          if (parts && (!stages.has_value() || stages->runs(static_cast<int>(m), static_cast<int>(r)))) count += value;
        }
    }
    for (auto& parts : norms) {
      const bool defined = theirs.take<bool>();
      const double value = theirs.take<double>();
      // Replicas hold the same.
      const bool counts = stages.has_value() && static_cast<int>(r) % stages->members() < stages->shards;
      if (defined && counts) parts.push_back(at::scalar_tensor(value, at::dtype(state_->wide()).device(spec_.device)));
    }
  }
  for (size_t p = 0; p < norms.size(); ++p)
    if (!norms[p].empty()) step.norms[p] = combined(norms[p]);
  step.agreed = true;
  if (step.failure != nullptr || step.aborted || !result.finite) step.dead = true;
}

// Of a tensor whose parts are on several ranks, in their order: the root of the sum of squares, in double.
at::Tensor Executor::combined(const std::vector<at::Tensor>& norms) const {
  if (norms.size() == 1) return norms.front();
  double squares = 0;
  for (const at::Tensor& norm : norms) {
    const double value = norm.item<double>();
    squares += value * value;
  }
  return at::scalar_tensor(std::sqrt(squares), norms.front().options());
}

namespace {

// Every two of the members exchange something, in an order in which none waits for another that waits for it.
void each_peer(const Stages& stages, int replica, const std::function<void(int shard, int peer, bool first)>& meet) {
  const int self = stages.shard();
  for (int other = 0; other < stages.shards; ++other)
    if (other != self) meet(other, stages.peer(replica * stages.shards + other), self < other);
}

void swap(Ranks& ranks, const at::Tensor& mine, const at::Tensor& theirs, int peer, bool first) {
  const auto send = [&] {
    if (mine.numel() > 0) ranks.send(Ranks::Channel::kEngine, mine, peer);
  };
  if (first) send();
  if (theirs.numel() > 0) ranks.receive(Ranks::Channel::kEngine, theirs, peer);
  if (!first) send();
}

}  // namespace

// Update on backward: the norm of a block whose parts are on several ranks, before it is updated.
void Executor::share_norms(Step& step, int block) const {
  const Stages& stages = *state_->placement().stages;
  const BlockLayout& layout = state_->layout[block];
  const auto& owned = layout.owned;
  const int64_t n = static_cast<int64_t>(owned.size());
  const at::Tensor mine = at::full({n}, -1.0, at::kDouble);
  for (int64_t i = 0; i < n; ++i) {
    const at::Tensor& norm = step.own_norms[owned[i].parameter];
    if (norm.defined()) mine.mutable_data_ptr<double>()[i] = norm.item<double>();
  }
  std::vector<at::Tensor> all(stages.shards);
  all[stages.shard()] = mine;
  each_peer(stages, stages.replica(), [&](int shard, int peer, bool first) {
    // It has nothing of this block that trains, and does not come here.
    if (layout.shard(layout.trained, shard).size() == 0) return;
    all[shard] = at::empty_like(mine);
    swap(*spec_.ranks, mine.view(at::kByte), all[shard].view(at::kByte), peer, first);
  });
  for (int64_t i = 0; i < n; ++i) {
    std::vector<at::Tensor> parts;
    for (const at::Tensor& of : all) {
      if (!of.defined()) continue;
      const double value = of.const_data_ptr<double>()[i];
      if (!(value == -1.0)) parts.push_back(at::scalar_tensor(value, at::dtype(state_->wide()).device(spec_.device)));
    }
    if (!parts.empty()) step.norms[owned[i].parameter] = combined(parts);
  }
}

// The parts of a block's parameters that are on several ranks, for runs without a tape; on the CPU. Who shares host
// memory has met the others before.
void Executor::gather_shards(int owner, at::Tensor& whole) const {
  const Placement& placement = state_->placement();
  const Stages& stages = *placement.stages;
  const BlockLayout& block = state_->layout[owner];
  const auto part = [&](int shard) {
    const Range range = block.shard(block.all, shard);
    return whole.narrow(0, range.begin, range.size());
  };
  if (placement.shared[owner].has_value()) {
    const at::ScalarType storage = state_->format().storage;
    Place slab = *placement.shared[owner];
    for (int shard = 0; shard < stages.shards; ++shard) {
      const int64_t n = block.shard(block.all, shard).size();
      slab.bytes = round_up(n * static_cast<int64_t>(c10::elementSize(storage)), kPage);
      part(shard).copy_(state_->memory().view(slab, 0, {n}, storage));
      slab.offset += slab.bytes;
    }
    return;
  }
  const at::Tensor mine = part(stages.shard());
  if (placement.param[owner].has_value()) {
    const Place& home = *placement.param[owner];
    const at::ScalarType storage = state_->format().storage;
    if (home.space == Space::kDisk) {
      const at::Tensor copy = at::empty({home.bytes / static_cast<int64_t>(c10::elementSize(storage))}, storage);
      state_->memory().access(home, 0, copy.mutable_data_ptr(), home.bytes, /*write=*/false);
      mine.copy_(copy.narrow(0, 0, mine.numel()));
    } else {
      mine.copy_(state_->memory().view(home, 0, {mine.numel()}, storage));
    }
  }
  each_peer(stages, stages.replica(), [&](int shard, int peer, bool first) {
    swap(*spec_.ranks, mine.view(at::kByte), part(shard).view(at::kByte), peer, first);
  });
}

// What ranks that share host memory wrote of it before they come here, all of them may read when they leave; and the
// other way round.
void Executor::meet_sharers() const {
  if (state_->memory().shared_bytes() == 0) return;
  const Stages& stages = *state_->placement().stages;
  const at::Tensor mine = at::zeros({1}, at::kByte), theirs = at::empty_like(mine);
  each_peer(stages, stages.replica(),
            [&](int, int peer, bool first) { swap(*spec_.ranks, mine, theirs, peer, first); });
}

}  // namespace stroma::engine
