#include "engine/nccl_group.h"

#include "engine/error.h"

#ifdef STROMA_NCCL

#include <ATen/cuda/CUDAEvent.h>
#include <c10/cuda/CUDAGuard.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include "engine/nccl_line.h"
#include "engine/rank_group.h"

namespace stroma::engine::nccl {
namespace {

using Clock = std::chrono::steady_clock;

// What the asking side and a line's thread know of one transfer.
struct Transfer {
  Transfer(at::Tensor tensor, c10::cuda::CUDAStream stream) : tensor(std::move(tensor)) { asked.record(stream); }

  const at::Tensor tensor;
  at::cuda::CUDAEvent asked;  // all that the pass's stream had been given
  at::cuda::CUDAEvent done;   // recorded once launched

  std::mutex mutex;
  std::condition_variable changed;
  bool launched = false;
  std::string failure;  // why it failed; empty: it has not

  void tell(const std::string& why) {
    const std::lock_guard lock(mutex);
    if (why.empty()) launched = true;
    failure = why;
    changed.notify_all();
  }
};

class Waiting final : public c10d::Work {
 public:
  explicit Waiting(std::shared_ptr<Transfer> transfer) : transfer_(std::move(transfer)) {}
  // The line's thread tells in any case: it waits for the other end as long as no rank is lost.
  bool wait(std::chrono::milliseconds) override {
    std::unique_lock lock(transfer_->mutex);
    transfer_->changed.wait(lock, [&] { return transfer_->launched || !transfer_->failure.empty(); });
    if (!transfer_->failure.empty()) engine::fail("RANKS", transfer_->failure);
    transfer_->done.block(c10::cuda::getCurrentCUDAStream(transfer_->tensor.device().index()));
    return true;
  }
  bool isCompleted() override {
    const std::lock_guard lock(transfer_->mutex);
    return !transfer_->failure.empty() || (transfer_->launched && transfer_->done.query());
  }

 private:
  std::shared_ptr<Transfer> transfer_;
};

// A line and its thread, which owns what it touches: one that NCCL does not give back is left behind.
class Lane {
  struct State {
    at::Device device = at::kCUDA;
    std::shared_ptr<Ranks> ranks;
    int peer = 0;
    bool sends = false;
    c10::intrusive_ptr<Line> line;
    std::mutex mutex;
    std::condition_variable changed;
    std::deque<std::shared_ptr<Transfer>> asked;
    bool closing = false, over = false;
    bool aborted = false;  // the thread's own, and whoever sees it over
  };

 public:
  Lane(at::Device device, const std::shared_ptr<Ranks>& ranks, const Pair& pair) {
    const bool sends = pair.first == ranks->spec().rank;
    state_ = std::make_shared<State>();
    state_->device = device;
    state_->ranks = ranks;
    state_->peer = sends ? pair.second : pair.first;
    state_->sends = sends;
    state_->line = make_line(device, ranks, pair, kGroupLane);
    const auto stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device.index());
    std::thread([state = state_, stream] { run(*state, stream); }).detach();
  }
  ~Lane() { begin_closing(); }  // also of a group that could not be made to its end
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  c10::intrusive_ptr<c10d::Work> begin(const at::Tensor& tensor) {
    auto transfer = std::make_shared<Transfer>(tensor, c10::cuda::getCurrentCUDAStream(state_->device.index()));
    {
      const std::lock_guard lock(state_->mutex);
      state_->asked.push_back(transfer);
      state_->changed.notify_all();
    }
    return c10::make_intrusive<Waiting>(std::move(transfer));
  }

  void begin_closing() {
    const std::lock_guard lock(state_->mutex);
    state_->closing = true;
    state_->changed.notify_all();
  }
  // Null where there is nothing to close: aborted, or in use by a thread that is left behind.
  c10::intrusive_ptr<Line> closed(Clock::time_point until) {
    std::unique_lock lock(state_->mutex);
    const bool over = state_->changed.wait_until(lock, until, [&] { return state_->over; });
    return over && !state_->aborted ? std::exchange(state_->line, nullptr) : nullptr;
  }

 private:
  static void run(State& state, c10::cuda::CUDAStream stream) {
    const c10::cuda::CUDAGuard guard(state.device);
    Silence silence;
    const c10::WarningUtils::WarningHandlerGuard quiet(&silence);
    while (const auto transfer = next(state)) {
      const std::string why = carry_out(state, *transfer, stream);
      if (!why.empty()) transfer->tell(why);
    }
    const std::lock_guard lock(state.mutex);
    state.over = true;
    state.changed.notify_all();
  }

  // Null: there will be none.
  static std::shared_ptr<Transfer> next(State& state) {
    std::unique_lock lock(state.mutex);
    state.changed.wait(lock, [&] { return state.closing || !state.asked.empty(); });
    if (state.asked.empty()) return nullptr;
    auto first = std::move(state.asked.front());
    state.asked.pop_front();
    return first;
  }

  // Why it failed; empty: it did not.
  static std::string carry_out(State& state, Transfer& transfer, c10::cuda::CUDAStream stream) {
    Ranks& ranks = *state.ranks;
    std::string why;
    try {
      const auto patient = [&] { return ranks.lost().empty(); };
      if (!wait_for([&] { return transfer.asked.query(); }, patient)) engine::fail("RANKS", ranks.lost());
      ranks.meet(state.peer, state.sends, kGroupLane);
      c10::intrusive_ptr<c10d::Work> work;
      {
        const c10::cuda::CUDAStreamGuard on(stream);
        work = state.line->begin(transfer.tensor);
        work->synchronize();  // of c10d's NCCL: this stream waits, not the host
        transfer.done.record(stream);
      }
      transfer.tell({});
      why = finish(*work, ranks, static_cast<int64_t>(transfer.tensor.nbytes()));
    } catch (const std::exception& error) {
      why = brief(error.what());
    }
    if (why.empty() && ranks.lost().empty()) return {};
    if (!std::exchange(state.aborted, true)) abort_line(state.device, state.line);
    try {
      ranks.lose(state.peer, why);
    } catch (const std::exception& error) {
      why = error.what();  // names who was lost, and why
    }
    return why;
  }

  std::shared_ptr<State> state_;
};

class NcclBackend final : public c10d::Backend {
 public:
  NcclBackend(at::Device device, std::shared_ptr<Ranks> ranks, const std::vector<int>& members, int place)
      : Backend(place, static_cast<int>(members.size())), device_(device), ranks_(std::move(ranks)), members_(members) {
    std::vector<int> ascending = members;
    std::sort(ascending.begin(), ascending.end());
    const int self = ranks_->spec().rank;
    // Every rank alike in this order: see nccl_line.h.
    for (const int from : ascending)
      for (const int to : ascending)
        if (from != to && (from == self || to == self)) {
          const Pair pair{from, to};
          lanes_.emplace(pair, std::make_unique<Lane>(device, ranks_, pair));
        }
  }
  ~NcclBackend() override {
    const auto until = Clock::now() + kClosing;
    for (auto& [pair, lane] : lanes_) lane->begin_closing();
    std::vector<c10::intrusive_ptr<Line>> lines;
    for (auto& [pair, lane] : lanes_)
      if (auto line = lane->closed(until)) lines.push_back(std::move(line));
    close_lines(device_, *ranks_, std::move(lines));
  }

  const std::string getBackendName() const override { return "nccl, met"; }

  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors, int to, int) override {
    return lanes_.at({ranks_->spec().rank, members_.at(to)})->begin(tensors.at(0));
  }
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors, int from, int) override {
    return lanes_.at({members_.at(from), ranks_->spec().rank})->begin(tensors.at(0));
  }

 private:
  const at::Device device_;
  const std::shared_ptr<Ranks> ranks_;
  const std::vector<int> members_;
  std::map<Pair, std::unique_ptr<Lane>> lanes_;
};

class NcclGroup final : public Group {
 public:
  NcclGroup(at::Device device, std::shared_ptr<Ranks> ranks, const std::vector<int>& members, int place)
      : registered_(c10::make_intrusive<NcclBackend>(device, std::move(ranks), members, place),
                    {c10::DeviceType::CUDA}) {}
  const std::string& name() const override { return registered_.name(); }

 private:
  RegisteredGroup registered_;
};

}  // namespace

std::unique_ptr<Group> group(at::Device device, std::shared_ptr<Ranks> ranks, const std::vector<int>& members) {
  const auto place = std::find(members.begin(), members.end(), ranks->spec().rank);
  if (place == members.end()) fail("RANKS", "[nccl] rank ", ranks->spec().rank, " is not of the group it is to make");
  return std::make_unique<NcclGroup>(device, std::move(ranks), members, static_cast<int>(place - members.begin()));
}

}  // namespace stroma::engine::nccl

#else

namespace stroma::engine::nccl {

std::unique_ptr<Group> group(at::Device, std::shared_ptr<Ranks>, const std::vector<int>&) {
  fail("NOT_SET_UP",
       "[nccl] this build of the addon has no NCCL. Run `npx stroma setup --cuda` with nvidia-nccl beside libtorch, or "
       "use transport \"gloo\"");
}

}  // namespace stroma::engine::nccl

#endif
