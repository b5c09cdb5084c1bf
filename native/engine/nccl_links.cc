#include "engine/nccl_links.h"

#include "engine/error.h"

#ifdef STROMA_NCCL

#define USE_C10D_NCCL
#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/env.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <thread>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>

#include "engine/cuda_device.h"

namespace stroma::engine::nccl {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using Pair = std::pair<int, int>;  // from, to
// How long the end of a session waits for the other ends, and a lost line for NCCL to let go of the card.
constexpr auto kClosing = std::chrono::seconds(5);
constexpr auto kEager = std::chrono::microseconds(200), kPause = std::chrono::microseconds(20);

// A group of two, sender first. Who watches a transfer is whoever waits for it: no thread of c10d's may judge it too,
// and none may end the process.
class Line final : public c10d::ProcessGroupNCCL {
 public:
  Line(c10::intrusive_ptr<c10d::Store> store, int place, c10::intrusive_ptr<Options> options)
      : ProcessGroupNCCL(std::move(store), place, 2, std::move(options)) {
    asyncErrorHandling_ = c10d::NoHandling;
  }

  // The transfer of whole `bytes`, which this end sends or receives.
  c10::intrusive_ptr<c10d::Work> begin(const at::Tensor& bytes) {
    std::vector<at::Tensor> list{bytes};
    return getRank() == 0 ? send(list, 1, 0) : recv(list, 0, 0);
  }

 protected:
  void terminateProcess(const std::string&) override {}
};

// With it c10d makes no watchdog (which throws on its own thread, where nobody can catch it) and no heartbeat monitor.
// Read by the constructor; what a cluster's scripts have set otherwise is for programs that wait in other ways.
void without_watchdog() {
  static std::once_flag once;
  std::call_once(once, [] { c10::utils::set_env("TORCH_NCCL_BLOCKING_WAIT", "1"); });
}

// What NCCL says, without where in c10d it was heard and the stack: its error, and its last words where it left some.
std::string brief(const std::string& text) {
  std::string said = text.substr(0, text.find('\n'));
  const std::string where = "NCCL error in: ", last = "Last error:\n";
  if (said.rfind(where, 0) == 0 && said.find(", ") != std::string::npos) said = said.substr(said.find(", ") + 2);
  const size_t at = text.find(last);
  if (at == std::string::npos) return said;
  const std::string rest = text.substr(at + last.size());
  const std::string words = rest.substr(0, rest.find('\n'));
  return words.empty() ? said : said + ": " + words;
}

// c10d says on stderr that a group of two makes a communicator of two.
class Silence final : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Waits until `done` says so; false: `patient` said no.
bool wait_for(const std::function<bool()>& done, const std::function<bool()>& patient) {
  const auto begun = Clock::now();
  while (!done()) {
    if (!patient()) return false;
    if (Clock::now() - begun < kEager)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(kPause);
  }
  return true;
}

// A call into NCCL may never come back when the other end is frozen: it runs on a thread of its own. False: it was left
// behind, as `patient` said no; so `work` owns all that it touches. Throws what it throws.
bool on_errand(at::Device device, std::function<void()> work, const std::function<bool()>& patient) {
  struct Errand {
    std::mutex mutex;
    std::condition_variable changed;
    bool over = false;
    std::exception_ptr failure;
  };
  const auto errand = std::make_shared<Errand>();
  std::thread([errand, device, work = std::move(work)]() mutable {
    std::exception_ptr failure;
    try {
      const c10::cuda::CUDAGuard guard(device);
      Silence silence;
      const c10::WarningUtils::WarningHandlerGuard quiet(&silence);
      work();
    } catch (...) {
      failure = std::current_exception();
    }
    work = nullptr;
    const std::lock_guard lock(errand->mutex);
    errand->over = true;
    errand->failure = failure;
    errand->changed.notify_all();
  }).detach();
  std::unique_lock lock(errand->mutex);
  while (!errand->over) {
    errand->changed.wait_for(lock, milliseconds(20));
    if (errand->over) break;
    lock.unlock();
    const bool waits = patient();
    lock.lock();
    if (!waits && !errand->over) return false;
  }
  if (errand->failure != nullptr) std::rethrow_exception(errand->failure);
  return true;
}

// A work's own words of why it failed; empty: it did not.
std::string failure_of(c10d::Work& work) {
  const std::exception_ptr failure = work.exception();
  if (failure == nullptr) return {};
  try {
    std::rethrow_exception(failure);
  } catch (const std::exception& error) {
    return brief(error.what());
  }
}

class NcclLinks final : public Links {
  struct End {
    c10::intrusive_ptr<Line> line;
    at::Tensor staging;  // on the card, for places on the host; grows
    bool aborted = false;
  };

 public:
  NcclLinks(at::Device device, std::shared_ptr<Ranks> ranks) : device_(device), ranks_(std::move(ranks)) {}

  ~NcclLinks() override {
    std::vector<c10::intrusive_ptr<Line>> lines;
    for (auto& [pair, end] : ends_)
      if (!end.aborted) lines.push_back(std::move(end.line));
    if (lines.empty()) return;
    const bool peace = ranks_->lost().empty();
    const auto until = Clock::now() + kClosing;
    try {
      on_errand(
          device_,
          [lines = std::move(lines), peace]() mutable {
            // In peace the other end may still be taking the last bytes: NCCL flushes, and waits for it.
            for (auto& line : lines) peace ? line->shutdown() : line->abort();
            lines.clear();
          },
          [&] { return Clock::now() < until; });
    } catch (const std::exception&) {
      // What cannot be closed is the process's own end to free.
    }
  }

  void open(const Tape& tape) override {
    const int self = ranks_->spec().rank;
    std::set<Pair> wanted;  // in the order that all ranks make lines in
    for (const Instruction& at : tape.instructions) {
      if (at.op == Instruction::Op::kSend) wanted.insert({self, at.peer});
      if (at.op == Instruction::Op::kReceive) wanted.insert({at.peer, self});
    }
    for (const Pair& pair : wanted)
      if (ends_.count(pair) == 0) ends_.emplace(pair, End{make(pair), {}, false});
  }

  void exchange(const Tape& tape, const Memory& memory, const Instruction& at) override {
    const bool sends = at.op == Instruction::Op::kSend;
    const int self = ranks_->spec().rank;
    End& end = ends_.at(sends ? Pair{self, at.peer} : Pair{at.peer, self});
    const at::Tensor held = memory.view(tape.places[sends ? at.from : at.to], 0, {at.bytes}, at::kByte);
    const at::Tensor bytes = held.is_cuda() ? held : staging(end, at.bytes);
    if (sends && !held.is_cuda()) cuda::transfer(device_, bytes.mutable_data_ptr(), held.const_data_ptr(), at.bytes);
    ranks_->meet(at.peer, sends);
    std::string why;
    try {
      const auto work = end.line->begin(bytes);
      if (wait_for([&] { return work->isCompleted(); }, [&] { return ranks_->lost().empty(); }))
        why = failure_of(*work);
    } catch (const std::exception& error) {
      why = brief(error.what());
    }
    if (!why.empty() || !ranks_->lost().empty()) {
      abort(end);
      ranks_->lose(at.peer, why);
    }
    if (!sends && !held.is_cuda()) cuda::transfer(device_, held.mutable_data_ptr(), bytes.const_data_ptr(), at.bytes);
    ranks_->moved(sends ? at.bytes : 0, sends ? 0 : at.bytes);
  }

 private:
  at::Tensor staging(End& end, int64_t bytes) const {
    if (!end.staging.defined() || end.staging.numel() < bytes)
      end.staging = at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_));
    return end.staging.narrow(0, 0, bytes);
  }

  // c10d makes a communicator with its first transfer: one byte, which also connects the two cards.
  c10::intrusive_ptr<Line> make(const Pair& pair) {
    const bool sends = pair.first == ranks_->spec().rank;
    const int peer = sends ? pair.second : pair.first;
    ranks_->meet(peer, sends);
    struct Making {
      c10::intrusive_ptr<Line> line;
      std::atomic<bool> given_up{false};
      std::string why;
    };
    const auto making = std::make_shared<Making>();
    const RankSpec& spec = ranks_->spec();
    const auto until = Clock::now() + milliseconds(static_cast<int64_t>(spec.join_seconds * 1e3));
    bool done = false;
    try {
      without_watchdog();
      const auto work = [making, sends, pair, device = device_, ranks = ranks_] {
        auto options = c10d::ProcessGroupNCCL::Options::create(/*is_high_priority_stream=*/true);
        options->timeout = milliseconds(static_cast<int64_t>(ranks->spec().silence_seconds * 1e3));
        options->group_name = "stroma " + std::to_string(pair.first) + " to " + std::to_string(pair.second);
        options->global_ranks_in_group = {static_cast<uint64_t>(pair.first), static_cast<uint64_t>(pair.second)};
        making->line = c10::make_intrusive<Line>(ranks->line_store(pair.first, pair.second), sends ? 0 : 1, options);
        try {
          const auto first = making->line->begin(at::zeros({1}, at::TensorOptions().dtype(at::kByte).device(device)));
          if (wait_for([&] { return first->isCompleted(); }, [&] { return !making->given_up; }))
            making->why = failure_of(*first);
        } catch (const std::exception& error) {
          making->why = brief(error.what());
        }
        if (making->given_up || !making->why.empty()) making->line->abort();
      };
      done = on_errand(device_, work, [&] { return ranks_->lost().empty() && Clock::now() < until; });
    } catch (const std::exception& error) {
      done = true;
      making->why = brief(error.what());
    }
    if (done && making->why.empty()) return making->line;
    making->given_up = true;
    if (const std::string lost = ranks_->lost(); !lost.empty()) fail("RANKS", lost);
    fail("RANKS", "[nccl] rank ", pair.first, " could not connect its card to that of rank ", pair.second, ": ",
         done ? making->why : "nothing in " + std::to_string(static_cast<int64_t>(spec.join_seconds)) + " s",
         ". NCCL_DEBUG=INFO says more; transport \"gloo\" goes through the host instead");
  }

  // Ends a kernel that waits for a lost rank: as long as it runs, the card frees nothing.
  void abort(End& end) const {
    const auto until = Clock::now() + kClosing;
    end.aborted = true;
    try {
      on_errand(device_, [line = end.line] { line->abort(); }, [&] { return Clock::now() < until; });
    } catch (const std::exception&) {
      // The rank that was lost is the news.
    }
  }

  const at::Device device_;
  const std::shared_ptr<Ranks> ranks_;
  std::map<Pair, End> ends_;  // changed by open() alone
};

}  // namespace

std::string version() { return c10d::getNcclVersion(); }

std::unique_ptr<Links> links(at::Device device, std::shared_ptr<Ranks> ranks) {
  return std::make_unique<NcclLinks>(device, std::move(ranks));
}

}  // namespace stroma::engine::nccl

#else

namespace stroma::engine::nccl {

std::string version() { return {}; }

std::unique_ptr<Links> links(at::Device, std::shared_ptr<Ranks>) {
  fail("NOT_SET_UP",
       "[nccl] this build of the addon has no NCCL. Run `npx stroma setup --cuda` with nvidia-nccl beside libtorch, or "
       "use transport \"gloo\"");
}

}  // namespace stroma::engine::nccl

#endif
