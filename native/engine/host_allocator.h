// The process's CPU allocator for tensors: counts every byte, and keeps freed large blocks for the next equal request.
//
// One allocation above the machine's (or its cgroup's) whole memory is refused with c10::OutOfMemoryError.
// A training step asks for the same sizes again and again. The stock allocator returns each large block to the kernel
// and faults its pages in anew; here a block is mapped once (with huge pages where the kernel allows) and reused.
#pragma once
#include <atomic>
#include <cstdint>

namespace stroma::engine {

// What tensors made on one thread are counted to while an AccountScope is open: the memory of a device that is really
// this process's. Freed tensors leave the account that they were counted to, wherever that happens.
struct Account {
  std::atomic<int64_t> live{0}, peak{0};
  std::atomic<int64_t> cap{INT64_MAX};  // an allocation beyond it throws c10::OutOfMemoryError
  void reset_peak() { peak.store(live.load()); }
  // Tensors may outlive a session: accounts are never freed.
  static Account& make() { return *new Account; }
};

class AccountScope {
 public:
  explicit AccountScope(Account& account);
  ~AccountScope();
  AccountScope(const AccountScope&) = delete;
  AccountScope& operator=(const AccountScope&) = delete;

 private:
  Account* before_;
};

struct HostMemory {
  int64_t live;    // bytes held by tensors now
  int64_t peak;    // highest `live` since the last reset_host_peak()
  int64_t cached;  // bytes kept for reuse
};

// Puts the allocator in place of PyTorch's, once per process. Tensors made earlier keep their own deleter.
void install_host_allocator();
HostMemory host_memory();
void reset_host_peak();
// What the operating system could still give this process, in its own estimate (MemAvailable, or what the cgroup
// leaves).
int64_t available_host_bytes();
// Gives cached blocks back to the operating system.
void trim_host_memory();

}  // namespace stroma::engine
