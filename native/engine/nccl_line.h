// One direction between the cards of two ranks: a communicator of two over c10d's ProcessGroupNCCL, with keys of its
// own in the store and a stream of its own, so that what waits on it holds up no other. nccl_links.h and nccl_group.h
// move their bytes over lines.
//
// Lines are made by both ends, and in one order over all ranks (by the sender, then by the receiver). That cannot
// deadlock: of all lines not yet made the first in this order has two ends that have made all their earlier ones, so
// neither waits for anything but the other.
//
// A transfer begins with a meeting of its ends on the host (Ranks::meet), once each has what its side waits for. A
// kernel of NCCL's holds processors of its card from its launch to its end, and cudaFree and cudaHostUnregister wait
// for it: none is launched before the other end is there, so none runs for longer than its bytes take. And whoever
// waits for a rank that is lost waits in Gloo, where the ranks' watch ends it.
#pragma once
#ifdef STROMA_NCCL

#define USE_C10D_NCCL
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include <utility>
#include <vector>

#include "engine/ranks.h"

namespace stroma::engine::nccl {

using Pair = std::pair<int, int>;  // ranks: from, to

// How long the end of a session waits for the other ends, and a lost line for NCCL to let go of the card.
constexpr auto kClosing = std::chrono::seconds(5);

// Who watches a transfer is whoever waits for it: no thread of c10d's may judge it too, and none may end the process.
class Line final : public c10d::ProcessGroupNCCL {
 public:
  Line(c10::intrusive_ptr<c10d::Store> store, int place, c10::intrusive_ptr<Options> options);
  // The transfer of the whole of a contiguous tensor on the card, which this end sends or receives.
  c10::intrusive_ptr<c10d::Work> begin(const at::Tensor& tensor);

 protected:
  void terminateProcess(const std::string&) override {}
};

// Makes this rank's end; collective over both. lane: of the ends' meetings. Throws RANKS, after the join time at most.
c10::intrusive_ptr<Line> make_line(at::Device device, const std::shared_ptr<Ranks>& ranks, const Pair& pair, int lane);
// Ends a kernel that waits for a lost rank: as long as it runs, the card frees nothing. Never throws.
void abort_line(at::Device device, const c10::intrusive_ptr<Line>& line);
// In peace the other ends may still be taking the last bytes: waits for them, kClosing at most. Never throws.
void close_lines(at::Device device, const Ranks& ranks, std::vector<c10::intrusive_ptr<Line>> lines);

// Waits until `done` says so; false: `patient` said no.
bool wait_for(const std::function<bool()>& done, const std::function<bool()>& patient);
// Waits for a transfer that both ends have begun. Why it failed, or did not end in the time that a rank may be silent
// and its bytes take at 10 MB/s; empty: it is done, or a rank is lost.
std::string finish(c10d::Work& work, const Ranks& ranks, int64_t bytes);
// What NCCL says, without where in c10d it was heard and the stack: its error, and its last words where it left some.
std::string brief(const std::string& text);

// c10d says on stderr that a group of two makes a communicator of two.
class Silence final : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace stroma::engine::nccl

#endif
