#include "engine/nccl_line.h"

#ifdef STROMA_NCCL

#include <ATen/Functions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/util/env.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "engine/error.h"

namespace stroma::engine::nccl {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
constexpr auto kEager = std::chrono::microseconds(200), kPause = std::chrono::microseconds(20);

// With it c10d makes no watchdog (which throws on its own thread, where nobody can catch it) and no heartbeat monitor.
// Read by the constructor; what a cluster's scripts have set otherwise is for programs that wait in other ways.
void without_watchdog() {
  static std::once_flag once;
  std::call_once(once, [] { c10::utils::set_env("TORCH_NCCL_BLOCKING_WAIT", "1"); });
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

}  // namespace

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

std::string finish(c10d::Work& work, const Ranks& ranks, int64_t bytes) {
  const double seconds = ranks.spec().silence_seconds + static_cast<double>(bytes) / 1e7;
  const auto until = Clock::now() + milliseconds(static_cast<int64_t>(seconds * 1e3));
  const auto patient = [&] { return ranks.lost().empty() && Clock::now() < until; };
  if (wait_for([&] { return work.isCompleted(); }, patient)) return failure_of(work);
  if (!ranks.lost().empty()) return {};
  return std::to_string(bytes) + " bytes were not there after " + std::to_string(static_cast<int64_t>(seconds)) +
         " s, though both ends had begun";
}

Line::Line(c10::intrusive_ptr<c10d::Store> store, int place, c10::intrusive_ptr<Options> options)
    : ProcessGroupNCCL(std::move(store), place, 2, std::move(options)) {
  asyncErrorHandling_ = c10d::NoHandling;
}

c10::intrusive_ptr<c10d::Work> Line::begin(const at::Tensor& tensor) {
  std::vector<at::Tensor> list{tensor};
  return getRank() == 0 ? send(list, 1, 0) : recv(list, 0, 0);
}

// c10d makes a communicator with its first transfer: one byte, which also connects the two cards.
c10::intrusive_ptr<Line> make_line(at::Device device, const std::shared_ptr<Ranks>& ranks, const Pair& pair, int lane) {
  const bool sends = pair.first == ranks->spec().rank;
  const int peer = sends ? pair.second : pair.first;
  ranks->meet(peer, sends, lane);
  struct Making {
    c10::intrusive_ptr<Line> line;
    std::atomic<bool> given_up{false};
    std::string why;
  };
  const auto making = std::make_shared<Making>();
  const RankSpec& spec = ranks->spec();
  const auto until = Clock::now() + milliseconds(static_cast<int64_t>(spec.join_seconds * 1e3));
  bool done = false;
  try {
    without_watchdog();
    const auto work = [making, sends, pair, device, ranks] {
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
    done = on_errand(device, work, [&] { return ranks->lost().empty() && Clock::now() < until; });
  } catch (const std::exception& error) {
    done = true;
    making->why = brief(error.what());
  }
  if (done && making->why.empty()) return making->line;
  making->given_up = true;
  if (const std::string lost = ranks->lost(); !lost.empty()) fail("RANKS", lost);
  fail("RANKS", "[nccl] rank ", pair.first, " could not connect its card to that of rank ", pair.second, ": ",
       done ? making->why : "nothing in " + std::to_string(static_cast<int64_t>(spec.join_seconds)) + " s",
       ". NCCL_DEBUG=INFO says more; transport \"gloo\" goes through the host instead");
}

void abort_line(at::Device device, const c10::intrusive_ptr<Line>& line) {
  const auto until = Clock::now() + kClosing;
  try {
    on_errand(device, [line] { line->abort(); }, [&] { return Clock::now() < until; });
  } catch (const std::exception&) {
    // The rank that was lost is the news.
  }
}

void close_lines(at::Device device, const Ranks& ranks, std::vector<c10::intrusive_ptr<Line>> lines) {
  if (lines.empty()) return;
  const bool peace = ranks.lost().empty();
  const auto until = Clock::now() + kClosing;
  try {
    on_errand(
        device,
        [lines = std::move(lines), peace]() mutable {
          for (auto& line : lines) peace ? line->shutdown() : line->abort();
          lines.clear();
        },
        [&] { return Clock::now() < until; });
  } catch (const std::exception&) {
    // What cannot be closed is the process's own end to free.
  }
}

}  // namespace stroma::engine::nccl

#endif
