// The arenas of a session: one flat range on the device, one on the host, one on disk, one that ranks share. Places of
// a tape are ranges of them.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>

#include "engine/disk.h"
#include "engine/graph.h"
#include "engine/host_allocator.h"

namespace stroma::engine {

class Memory {
 public:
  // account: what memory of a device that is this process's own is counted to. shared: of the placement's shared_bytes.
  // Throws OUT_OF_MEMORY, DISK_FULL.
  Memory(const Placement& placement, at::Device device, Account& account, const std::string& disk_folder,
         at::Tensor shared);

  // A tensor over a range, on the device or on the CPU: memory of its own as far as autograd's version counters go.
  at::Tensor view(const Place& place, int64_t offset_bytes, at::IntArrayRef sizes, at::ScalarType dtype) const;
  char* address(const Place& place) const;
  // Reads or writes a range of any space, between steps.
  void access(const Place& place, int64_t offset_bytes, void* data, int64_t bytes, bool write) const;
  void zero(const Place& place) const;
  Disk& disk() const;
  void check(const Place& place, const char* what) const;  // throws TAPE when it lies outside its arena
  int64_t device_bytes() const { return device_.numel(); }
  int64_t host_bytes() const { return host_.numel(); }
  int64_t shared_bytes() const { return shared_.defined() ? shared_.numel() : 0; }
  int64_t disk_bytes() const { return disk_ ? disk_->bytes() : 0; }

 private:
  at::Device on_;
  at::Tensor device_, host_, shared_;  // bytes
  std::unique_ptr<Disk> disk_;
};

}  // namespace stroma::engine
