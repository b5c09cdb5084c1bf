#include "engine/copy_queues.h"

namespace stroma::engine {

CopyQueues::CopyQueues(std::shared_ptr<Ranks> ranks)
    : ranks_(std::move(ranks)), queues_(lines_among(ranks_.get())), busy_(queues_.size()), threads_(queues_.size()) {}

void CopyQueues::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_)
    if (thread.joinable()) thread.join();
}

void CopyQueues::begin(const Tape& tape, const Memory& memory, Timeline* timeline) {
  reset(tape, memory, timeline);
  start();
}

void CopyQueues::reset(const Tape& tape, const Memory& memory, Timeline* timeline) {
  const std::lock_guard lock(mutex_);
  tape_ = &tape;
  memory_ = &memory;
  timeline_ = timeline;
  done_.assign(tape.instructions.size(), 0);
  failure_ = nullptr;
  aborted_ = false;
  counts_ = {};
}

void CopyQueues::start() {
  {
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < tape_->instructions.size(); ++i) {
      const Instruction& copy = tape_->instructions[i];
      if (!copy.queued()) continue;
      const int q = copy.line();
      counts_.bytes[static_cast<int>(copy.queue)] += copy.bytes;
      queues_[q].push_back(static_cast<int>(i));
      if (!threads_[q].joinable()) threads_[q] = std::thread([this, q] { serve(q); });
    }
  }
  changed_.notify_all();
}

void CopyQueues::await(int instruction) {
  if (at(instruction).waits.empty()) return;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return failure_ != nullptr || ready(instruction); });
  if (failure_ != nullptr) std::rethrow_exception(failure_);
}

void CopyQueues::finished(int instruction) {
  {
    const std::lock_guard lock(mutex_);
    done_[instruction] = 1;
  }
  changed_.notify_all();
}

void CopyQueues::end(bool abort) {
  drain(abort);
  settle(abort);
}

void CopyQueues::drain(bool abort) {
  std::unique_lock lock(mutex_);
  if (abort) {
    aborted_ = true;
    changed_.notify_all();
  }
  changed_.wait(lock, [this] {
    for (size_t q = 0; q < queues_.size(); ++q)
      if (!queues_[q].empty() || busy_[q]) return false;
    return true;
  });
}

void CopyQueues::settle(bool abort) {
  tape_ = nullptr;
  if (!abort && failure_ != nullptr) std::rethrow_exception(failure_);
}

bool CopyQueues::ready(int instruction) const {
  for (const int w : at(instruction).waits)
    if (!done_[w]) return false;
  return true;
}

void CopyQueues::serve(int q) {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] {
      return stopping_ || (!queues_[q].empty() && (ready(queues_[q].front()) || aborted_ || failure_ != nullptr));
    });
    if (stopping_) return;
    const int instruction = queues_[q].front();
    queues_[q].pop_front();
    if (failure_ != nullptr || aborted_) {
      changed_.notify_all();
      continue;
    }
    busy_[q] = true;
    lock.unlock();
    std::exception_ptr failure;
    try {
      carry_out(instruction);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    busy_[q] = false;
    if (failure != nullptr && failure_ == nullptr) failure_ = failure;
    done_[instruction] = 1;
    changed_.notify_all();
  }
}

}  // namespace stroma::engine
