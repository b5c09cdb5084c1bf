// A c10d process group over the cards of some of the ranks, for operators that find theirs by name
// (kernels/ring_attention.h): what they pass around goes from card to card over NCCL. The group of rank_group.h is its
// counterpart over Gloo. A build without CUDA or without NCCL's headers has the same function; it refuses.
//
// Every pair of members has two lines (nccl_line.h), one a direction, all made with the group. A line here has a
// thread: once the card has done what the pass's stream had been given when the transfer was asked for, it meets the
// other end, launches, and watches the transfer to its end. So an operator asks and goes on; when it waits, the host
// waits until both ends are there, and the pass's stream for the bytes. What a lost rank leaves half done that thread
// aborts, so that no stream waits for ever.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>
#include <vector>

#include "engine/ranks.h"

namespace stroma::engine::nccl {

class Group {
 public:
  // Waits a few seconds at most, for transfers under way and for the other ends.
  virtual ~Group() = default;
  // In c10d's registry, in this process, until the end of this.
  virtual const std::string& name() const = 0;
};

// members: ranks of the run by their place in the group, this one among them; two ranks share one such group at most.
// Collective over them. Throws RANKS, and NOT_SET_UP in a build without NCCL.
std::unique_ptr<Group> group(at::Device device, std::shared_ptr<Ranks> ranks, const std::vector<int>& members);

}  // namespace stroma::engine::nccl
