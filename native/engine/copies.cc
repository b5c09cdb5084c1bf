#include "engine/copies.h"

#include <ATen/Functions.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "engine/copy_queues.h"
#include "engine/cuda_device.h"
#include "engine/error.h"

namespace stroma::engine {
namespace {

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// One copy, carried out. Ranges were checked against their places by the executor.
void carry_out(const Tape& tape, const Memory& memory, const Instruction& copy) {
  const Place &from = tape.places[copy.from], &to = tape.places[copy.to];
  switch (copy.queue) {
    case CopyQueue::kLoad:
      memory.disk().read(from.offset + copy.at, memory.address(to) + copy.at, copy.bytes);
      break;
    case CopyQueue::kSave:
      memory.disk().write(to.offset + copy.at, memory.address(from) + copy.at, copy.bytes);
      break;
    default:
      std::memcpy(memory.address(to) + copy.at, memory.address(from) + copy.at, static_cast<size_t>(copy.bytes));
  }
}

class Threaded final : public CopyQueues {
 public:
  Threaded(const SimOptions& options, std::shared_ptr<Ranks> ranks)
      : CopyQueues(std::move(ranks)), late_(options.adversary.has_value()) {
    links_[static_cast<int>(CopyQueue::kIn)].rate = options.host_to_device;
    links_[static_cast<int>(CopyQueue::kOut)].rate = options.device_to_host;
    const size_t lines = lines_among(ranks_.get());
    for (size_t q = 0; q < lines; ++q)
      draws_.push_back(static_cast<uint64_t>(options.adversary.value_or(0)) * lines + q);
  }
  ~Threaded() override { stop(); }

 private:
  // A queue is a link of so many bytes a second.
  struct Link {
    std::optional<double> rate;
    double free_at = 0;
  };

  void carry_out(int instruction) override {
    const Instruction& copy = at(instruction);
    const double start = now();
    if (late_) delay(copy);
    if (copy.op == Instruction::Op::kCopy)
      engine::carry_out(*tape_, *memory_, copy);
    else
      exchange(*tape_, *memory_, copy, *ranks_);
    throttle(links_[static_cast<int>(copy.queue)], start, copy.bytes);
    if (timeline_ == nullptr) return;
    timeline_->start[instruction] = start;
    timeline_->end[instruction] = now();
  }

  // Whoever reads or writes the target too soon is found out: by NaN, or by what is lost.
  void delay(const Instruction& copy) {
    if (copy.op == Instruction::Op::kCopy && copy.queue != CopyQueue::kSave)
      std::memset(memory_->address(tape_->places[copy.to]) + copy.at, 255, static_cast<size_t>(copy.bytes));
    uint64_t& state = draws_[copy.line()];
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    const uint64_t draw = state >> 33;
    if (draw % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(draw / 2 % 1000));
  }

  // What memcpy did sooner, the link has not done yet.
  static void throttle(Link& link, double start, int64_t bytes) {
    if (!link.rate.has_value()) return;
    link.free_at = std::max(link.free_at, start) + static_cast<double>(bytes) / *link.rate;
    const double wait = link.free_at - now();
    if (wait > 0) std::this_thread::sleep_for(std::chrono::duration<double>(wait));
  }

  const bool late_;
  std::vector<uint64_t> draws_;  // by line; each its thread's own
  Link links_[kCopyQueues];      // by CopyQueue; only queues of one thread have a rate
};

class Adversary final : public Copies {
 public:
  explicit Adversary(int64_t seed) : hasty_(seed % 3 == 0), state_(static_cast<uint64_t>(seed) * 2 + 1) {}

  void begin(const Tape& tape, const Memory& memory, Timeline* timeline) override {
    tape_ = &tape;
    memory_ = &memory;
    timeline_ = timeline;
    done_.assign(tape.instructions.size(), 0);
    counts_ = {};
    for (auto& queue : queues_) queue.clear();
    std::fill(std::begin(started_), std::end(started_), false);
    for (size_t i = 0; i < tape.instructions.size(); ++i) {
      const Instruction& copy = tape.instructions[i];
      if (!copy.queued()) continue;
      counts_.bytes[static_cast<int>(copy.queue)] += copy.bytes;
      queues_[static_cast<int>(copy.queue)].push_back(static_cast<int>(i));
    }
    stir();
  }
  void await(int instruction) override {
    for (const int w : tape_->instructions[instruction].waits) complete(w);
  }
  void finished(int instruction) override {
    done_[instruction] = 1;
    stir();
  }
  void end(bool abort) override {
    for (bool more = !abort; more;) {
      more = false;
      for (int q = 0; q < kCopyQueues; ++q)
        if (!queues_[q].empty() && ready(queues_[q].front())) {
          finish_front(q);
          more = true;
        }
    }
    for (auto& queue : queues_) queue.clear();
  }

 private:
  uint64_t draw() {
    state_ = state_ * 6364136223846793005ull + 1442695040888963407ull;
    return state_ >> 33;
  }
  bool ready(int instruction) const {
    for (const int w : tape_->instructions[instruction].waits)
      if (!done_[w]) return false;
    return true;
  }
  // Whatever may run has begun: its target is lost. Now and then, one completes early; the hasty one's all do, which
  // shows a place that is written before its last reader.
  void stir() {
    for (int q = 0; q < kCopyQueues; ++q)
      while (!queues_[q].empty() && ready(queues_[q].front())) {
        start_front(q);
        if (!hasty_ && draw() % 8 != 0) break;
        finish_front(q);
      }
  }
  void start_front(int q) {
    if (started_[q]) return;
    started_[q] = true;
    const Instruction& copy = tape_->instructions[queues_[q].front()];
    // All ones is NaN in every floating dtype. What goes to disk is lost there, too.
    if (copy.queue == CopyQueue::kSave) {
      const at::Tensor lost = at::full({copy.bytes + kPageSlack}, 255, at::kByte);
      char* at = static_cast<char*>(lost.mutable_data_ptr());
      at += (kPageSlack - reinterpret_cast<uintptr_t>(at) % kPageSlack) % kPageSlack;
      memory_->disk().write(tape_->places[copy.to].offset + copy.at, at, copy.bytes);
      return;
    }
    std::memset(memory_->address(tape_->places[copy.to]) + copy.at, 255, static_cast<size_t>(copy.bytes));
  }
  void finish_front(int q) {
    start_front(q);
    const int instruction = queues_[q].front();
    if (timeline_ != nullptr) timeline_->start[instruction] = now();
    carry_out(*tape_, *memory_, tape_->instructions[instruction]);
    if (timeline_ != nullptr) timeline_->end[instruction] = now();
    done_[instruction] = 1;
    started_[q] = false;
    queues_[q].pop_front();
  }
  // Everything before it on its queue, and what that waits for, and no more.
  void complete(int instruction) {
    if (done_[instruction]) return;
    const Instruction& copy = tape_->instructions[instruction];
    if (copy.op != Instruction::Op::kCopy) fail("TAPE", "[tape] an instruction waits for one that has not run");
    const int q = static_cast<int>(copy.queue);
    while (!done_[instruction]) {
      if (queues_[q].empty()) fail("TAPE", "[tape] an instruction waits for a copy that is none");
      for (const int w : tape_->instructions[queues_[q].front()].waits) complete(w);
      finish_front(q);
    }
  }

  static constexpr int64_t kPageSlack = 4096;
  const bool hasty_;
  uint64_t state_;
  std::deque<int> queues_[kCopyQueues];
  bool started_[kCopyQueues] = {};
  const Tape* tape_ = nullptr;
  const Memory* memory_ = nullptr;
  Timeline* timeline_ = nullptr;
  std::vector<char> done_;
};

}  // namespace

bool is_word(const Tape& tape, const Instruction& at) {
  return tape.places[at.op == Instruction::Op::kSend ? at.from : at.to].space == Space::kShared;
}

void exchange(const Tape& tape, const Memory& memory, const Instruction& at, Ranks& ranks) {
  const bool sends = at.op == Instruction::Op::kSend;
  if (is_word(tape, at)) {
    const at::Tensor word = at::zeros({at.bytes}, at::kByte);
    sends ? ranks.send(Ranks::Channel::kData, word, at.peer) : ranks.receive(Ranks::Channel::kData, word, at.peer);
    return;
  }
  const at::Tensor held = memory.view(tape.places[sends ? at.from : at.to], 0, {at.bytes}, at::kByte);
  const bool here = held.is_cpu();
  const at::Tensor bytes = here ? held : at::empty({at.bytes}, at::kByte);
  if (sends) {
    if (!here) cuda::transfer(held.device(), bytes.mutable_data_ptr(), held.const_data_ptr(), at.bytes);
    ranks.send(Ranks::Channel::kData, bytes, at.peer);
  } else {
    ranks.receive(Ranks::Channel::kData, bytes, at.peer);
    if (!here) cuda::transfer(held.device(), held.mutable_data_ptr(), bytes.const_data_ptr(), at.bytes);
  }
}

std::unique_ptr<Copies> threaded_copies(const SimOptions& options, std::shared_ptr<Ranks> ranks) {
  return std::make_unique<Threaded>(options, std::move(ranks));
}
std::unique_ptr<Copies> adversary_copies(int64_t seed) { return std::make_unique<Adversary>(seed); }

}  // namespace stroma::engine
