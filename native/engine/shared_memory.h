// Host memory that ranks of one machine have in common, for parameters that all of them read and each writes a part of.
#pragma once
#include <ATen/core/Tensor.h>

#include <vector>

#include "engine/ranks.h"

namespace stroma::engine {

// Bytes, zero, the same for all members (ranks of the run, this one among them); collective over them. The memory is a
// file without a name: the kernel frees it when the last process that maps it has ended, however it ends. pinned: also
// registered with CUDA. Throws OUT_OF_MEMORY, and CONFIG where a member cannot see the first one's memory: the same on
// all.
at::Tensor shared_bytes(Ranks& ranks, const std::vector<int>& members, int64_t bytes, bool pinned);

}  // namespace stroma::engine
