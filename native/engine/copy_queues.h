// What copy queues on threads share: one thread a queue, started by its first instruction, takes them in order, each
// when what it waits for is done. What "done" means is the derived class's: on a card, that it has been issued.
#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "engine/copies.h"

namespace stroma::engine {

class CopyQueues : public Copies {
 public:
  void begin(const Tape& tape, const Memory& memory, Timeline* timeline) override;
  void await(int instruction) override;
  void finished(int instruction) override;
  void end(bool abort) override;

 protected:
  explicit CopyQueues(std::shared_ptr<Ranks> ranks);
  // Ends the threads; derived destructors begin with it, while all that carry_out() uses is there.
  void stop();
  // On the thread of its queue.
  virtual void carry_out(int instruction) = 0;
  // The two halves of begin(): after start() the queues are at work.
  void reset(const Tape& tape, const Memory& memory, Timeline* timeline);
  void start();
  // The two halves of end().
  void drain(bool abort);
  void settle(bool abort);

  const Instruction& at(int instruction) const { return tape_->instructions[instruction]; }

  const std::shared_ptr<Ranks> ranks_;
  const Tape* tape_ = nullptr;
  const Memory* memory_ = nullptr;
  Timeline* timeline_ = nullptr;

 private:
  bool ready(int instruction) const;
  void serve(int q);

  std::mutex mutex_;
  std::condition_variable changed_;
  // By Instruction::line().
  std::vector<std::deque<int>> queues_;
  std::vector<char> busy_;
  std::vector<std::thread> threads_;
  std::vector<char> done_;
  std::exception_ptr failure_;
  bool aborted_ = false, stopping_ = false;
};

}  // namespace stroma::engine
