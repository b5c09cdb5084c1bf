// What a CUDA device does otherwise than this process's memory: pinned host pages, copies on streams, its own
// allocator's counters. A build without CUDA has the same functions; they refuse.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <string>

#include "engine/copies.h"

namespace stroma::engine::cuda {

bool built();
// Throws NOT_SET_UP without a CUDA build or driver, INVALID_ARGUMENT for a card that is not there.
void check_device(at::Device device);
// Where the card sits in its machine, "0000:65:00.0": the same for all processes that use it, whatever they number it.
std::string bus_address(at::Device device);
// Pages of our own, registered with the driver: the stock pinned allocator rounds up to powers of two (20.4 -> 32 GiB).
at::Tensor pinned_bytes(int64_t bytes);
// Registers whole pages of this process with the driver. Throws OUT_OF_MEMORY.
void pin(void* data, int64_t bytes);
void unpin(void* data);
// Between device memory and pageable or pinned memory, done at return.
void transfer(at::Device device, void* to, const void* from, int64_t bytes);
void zero(at::Device device, void* data, int64_t bytes);

// Makes it this thread's current device, so that nothing lands on another card's context, with a stream of the thread's
// own; first thing on a session's thread. Others do not wait for that stream: what they get of a card's is copied
// first. bytes: an imitation of a smaller card; nullopt: all of it. Takes a second where the process is new to the
// card. Returns the bytes that are taken on it then: cuBLAS keeps a workspace for each stream from its first product
// on, which is done here, so that no step meets it.
int64_t open(at::Device device, std::optional<int64_t> bytes);
struct DeviceMemory {
  int64_t live = 0, peak = 0;  // bytes of tensors
  int64_t segments = 0;        // times that the driver was asked for memory
};
DeviceMemory memory(at::Device device);
void reset_peak(at::Device device);
void give_back();  // cached segments, to the driver

// A stream for each direction, and threads for the disk queues. Instructions of the compute queue are ordered by events
// of the current stream.
// over_nccl: between ranks from card to card; else through the host, over Gloo.
std::unique_ptr<Copies> copies(at::Device device, std::shared_ptr<Ranks> ranks, bool over_nccl);

}  // namespace stroma::engine::cuda
