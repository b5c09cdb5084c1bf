// NCCL between the cards of ranks, over c10d's ProcessGroupNCCL: what a tape's sends and receives move goes from card
// to card and not through the host. A build without CUDA or without NCCL's headers has the same functions; they refuse.
//
// A line is one direction between two ranks: a communicator of two, of its own, so that what waits on it holds up no
// other. Lines are made by open(), on the thread that begins a step, by both ends and in one order over all ranks
// (by the sender, then by the receiver). That cannot deadlock: of all lines not yet made the first in this order has
// two ends that have made all their earlier ones, so neither waits for anything but the other. The tapes of all ranks
// are proved to have every send met by a receive, so both ends know of the line.
//
// A transfer begins with a meeting of its ends on the host, over Gloo, once each has what its side waits for. A kernel
// of NCCL's holds processors of its card from its launch to its end, and cudaFree and cudaHostUnregister wait for it:
// none is launched before the other end is there, so none runs for longer than its bytes take. And whoever waits for a
// rank that is lost waits in Gloo, where the ranks' watch ends it.
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
