// The copy queues of a step: host to device, device to host, disk to host, host to disk, and to and from other ranks.
// Each has its instructions from the beginning of the step and runs them in order; one begins when what it waits for is
// done, wherever the walk is: a rank that stands still over a pass must yet take what another sends to get on. The
// executor asks await() before each of its own instructions and tells finished() after it.
#pragma once
#include <memory>

#include "engine/memory.h"
#include "engine/ranks.h"

namespace stroma::engine {

struct CopyCounts {
  int64_t bytes[kCopyQueues] = {};  // by CopyQueue
};

// Queues that a session with these ranks has: Instruction::line().
inline int lines_among(const Ranks* ranks) { return Instruction::lines(ranks == nullptr ? 0 : ranks->spec().size); }

// When an instruction ran, in seconds of the steady clock; by position in the tape.
struct Timeline {
  std::vector<double> start, end;
};

struct SimOptions {
  std::optional<double> host_to_device, device_to_host;  // bytes a second
  std::optional<int64_t> adversary;                      // seed; among ranks copies are late by the clock
};

class Copies {
 public:
  virtual ~Copies() = default;
  // The tape and memory outlive the step. timeline may be null.
  virtual void begin(const Tape& tape, const Memory& memory, Timeline* timeline) = 0;
  // Returns when the instructions that this one waits for are done. Throws what a copy failed with.
  virtual void await(int instruction) = 0;
  virtual void finished(int instruction) = 0;
  // Returns when every copy is done; abort: drops those that have not begun. Throws what a copy failed with,
  // unless aborting.
  virtual void end(bool abort) = 0;
  const CopyCounts& counts() const { return counts_; }

 protected:
  CopyCounts counts_;
};

// Whether a send or receive only says that what lies in shared memory has changed.
bool is_word(const Tape& tape, const Instruction& at);
// Carries out a send or receive; returns when it is done. Gloo talks from this process's memory: what lies on a card
// goes through it.
void exchange(const Tape& tape, const Memory& memory, const Instruction& at, Ranks& ranks);

// A thread for each queue, started by the first copy. With an adversary a copy's target is full of NaN from when it may
// begin, and it completes some time later. ranks: whom sends and receives go through; null where there are
// none.
std::unique_ptr<Copies> threaded_copies(const SimOptions& options, std::shared_ptr<Ranks> ranks);
// No threads: every copy completes as late and in as odd an order as its waits allow, its target full of NaN until
// then.
std::unique_ptr<Copies> adversary_copies(int64_t seed);

}  // namespace stroma::engine
