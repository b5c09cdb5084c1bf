// NCCL between the cards of ranks, over c10d's ProcessGroupNCCL: what a tape's sends and receives move goes from card
// to card and not through the host. A build without CUDA or without NCCL's headers has the same functions; they refuse.
//
// Lines (nccl_line.h) are made by open(), on the thread that begins a step, in the one order over all ranks. The tapes
// of all ranks are proved to have every send met by a receive, so both ends know of a line.
#pragma once
#include <memory>
#include <string>

#include "engine/memory.h"
#include "engine/ranks.h"

namespace stroma::engine::nccl {

// Of the library that runs, "2.30.7"; empty: this build has none.
std::string version();

class Links {
 public:
  virtual ~Links() = default;
  // Makes what lines of this tape are not there yet. Collective over the ends of each. Throws RANKS.
  virtual void open(const Tape& tape) = 0;
  // Carries out a send or receive, from or to the device or the host; returns when it is done. What streams still do to
  // its bytes must be over. One thread at a time for each line. Throws RANKS when a rank is lost.
  virtual void exchange(const Tape& tape, const Memory& memory, const Instruction& at) = 0;
};

// Throws NOT_SET_UP in a build without NCCL. Its end waits a few seconds at most, for the other ends of its lines.
std::unique_ptr<Links> links(at::Device device, std::shared_ptr<Ranks> ranks);

}  // namespace stroma::engine::nccl
