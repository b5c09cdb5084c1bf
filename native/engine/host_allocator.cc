#include "engine/host_allocator.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <list>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

namespace stroma::engine {
namespace {

constexpr size_t kLarge = 64 << 10;  // from here on blocks are mapped and cached
constexpr size_t kHugePage = 2 << 20;
constexpr size_t kAlignment = 64;  // of small blocks, as in c10

thread_local Account* current_account = nullptr;

// Lies before every small block, in one alignment's room.
struct Header {
  size_t bytes;
  Account* account;
};
static_assert(sizeof(Header) <= kAlignment);
Header* header_of(void* data) { return reinterpret_cast<Header*>(static_cast<char*>(data) - kAlignment); }

void leave(Account* account, size_t bytes) {
  if (account != nullptr) account->live -= static_cast<int64_t>(bytes);
}

// Counts to the thread's account; refuses what goes beyond its cap.
Account* enter(size_t bytes) {
  Account* account = current_account;
  if (account == nullptr) return nullptr;
  const int64_t now = account->live.fetch_add(static_cast<int64_t>(bytes)) + static_cast<int64_t>(bytes);
  if (now > account->cap) {
    leave(account, bytes);
    TORCH_CHECK_WITH(OutOfMemoryError, false, "[memory] the device holds ", now - static_cast<int64_t>(bytes), " of ",
                     account->cap.load(), " bytes, and ", bytes, " more were asked for");
  }
  int64_t peak = account->peak.load();
  while (now > peak && !account->peak.compare_exchange_weak(peak, now)) {
  }
  return account;
}

// What this process may use: the machine's memory or its cgroup's limit.
size_t limit_in(const char* path) {
  std::ifstream file(path);
  std::string text;
  file >> text;
  if (text.empty() || text.find_first_not_of("0123456789") != std::string::npos) return SIZE_MAX;  // "max"
  return text.size() > 18 ? SIZE_MAX : static_cast<size_t>(std::stoull(text));
}

size_t machine_bytes() {
  const auto pages = static_cast<size_t>(sysconf(_SC_PHYS_PAGES)), size = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return std::min(
      {pages * size, limit_in("/sys/fs/cgroup/memory.max"), limit_in("/sys/fs/cgroup/memory/memory.limit_in_bytes")});
}

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

class HostAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    // Linux grants memory that is not there and kills the process on first touch: what cannot fit is refused here.
    if (bytes > limit_)
      TORCH_CHECK_WITH(OutOfMemoryError, false, "[memory] a tensor of ", bytes,
                       " bytes was asked for, and this machine has ", limit_);
    void* data = bytes == 0 ? nullptr : bytes < kLarge ? small(bytes) : large(bytes);
    return {data, data, &release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* target, const void* source, size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }

  HostMemory memory() const { return {live_.load(), peak_.load(), cached_.load()}; }
  void reset_peak() { peak_.store(live_.load()); }
  void trim() {
    const std::lock_guard lock(mutex_);
    trim_locked();
  }

 private:
  static void release(void* data);

  void count(int64_t bytes) {
    const int64_t now = live_.fetch_add(bytes) + bytes;
    int64_t peak = peak_.load();
    while (now > peak && !peak_.compare_exchange_weak(peak, now)) {
    }
  }

  void* small(size_t bytes) {
    void* base = nullptr;
    Account* account = enter(bytes);
    if (posix_memalign(&base, kAlignment, bytes + kAlignment) != 0) {
      leave(account, bytes);
      out_of_memory(bytes);
    }
    void* data = static_cast<char*>(base) + kAlignment;
    *header_of(data) = {bytes, account};
    count(static_cast<int64_t>(bytes));
    return data;
  }

  void* large(size_t bytes) {
    const size_t size = round_up(bytes, kLarge);
    Account* account = enter(size);
    void* data = take(size);
    if (data == nullptr) {
      leave(account, size);
      out_of_memory(bytes);
    }
    const std::lock_guard lock(mutex_);
    used_.emplace(data, Used{size, account});
    count(static_cast<int64_t>(size));
    return data;
  }

  // From what is kept, else from the operating system; nullptr when that has no more.
  void* take(size_t size) {
    {
      const std::lock_guard lock(mutex_);
      const auto it = by_size_.find(size);
      if (it != by_size_.end()) {
        const auto last = it->second.back();
        it->second.pop_back();
        if (it->second.empty()) by_size_.erase(it);
        return uncache(last);
      }
    }
    void* data = map(size);
    if (data != nullptr) return data;
    trim();
    return map(size);
  }

  // Blocks of a huge page and more begin on one.
  static void* map(size_t size) {
    const size_t slack = size >= kHugePage ? kHugePage : 0;
    char* base = static_cast<char*>(
        mmap(nullptr, size + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base == MAP_FAILED) return nullptr;
    if (slack == 0) return base;
    char* aligned = reinterpret_cast<char*>(round_up(reinterpret_cast<size_t>(base), kHugePage));
    if (aligned != base) munmap(base, aligned - base);
    const size_t tail = (base + size + slack) - (aligned + size);
    if (tail != 0) munmap(aligned + size, tail);
    madvise(aligned, size, MADV_HUGEPAGE);
    return aligned;
  }

  void give_back(void* data) {
    if (data == nullptr) return;
    const std::lock_guard lock(mutex_);
    const auto it = used_.find(data);
    if (it == used_.end()) {
      const Header header = *header_of(data);
      live_ -= static_cast<int64_t>(header.bytes);
      leave(header.account, header.bytes);
      std::free(header_of(data));
      return;
    }
    const auto [size, account] = it->second;
    used_.erase(it);
    leave(account, size);
    live_ -= static_cast<int64_t>(size);
    free_.push_back({size, data});
    by_size_[size].push_back(std::prev(free_.end()));
    cached_ += static_cast<int64_t>(size);
    // What is cached may not outgrow what was ever needed at once. The oldest goes: shapes that are gone must not keep
    // those that come now from being kept.
    while (cached_ + live_ > peak_ever()) {
      const auto oldest = free_.begin();
      const size_t n = oldest->size;
      const auto same = by_size_.find(n);
      same->second.pop_front();
      if (same->second.empty()) by_size_.erase(same);
      munmap(uncache(oldest), n);
    }
  }

  int64_t peak_ever() {
    highest_ = std::max(highest_, peak_.load());
    return highest_ + highest_ / 4;
  }

  void trim_locked() {
    for (const auto& [size, data] : free_) munmap(data, size);
    free_.clear();
    by_size_.clear();
    cached_ = 0;
    highest_ = live_;
  }

  [[noreturn]] static void out_of_memory(size_t bytes) {
    TORCH_CHECK_WITH(OutOfMemoryError, false, "[memory] the operating system refused ", bytes, " bytes of host memory");
  }

  struct Used {
    size_t size;
    Account* account;
  };
  struct Free {
    size_t size;
    void* data;
  };

  void* uncache(std::list<Free>::iterator block) {
    void* data = block->data;
    cached_ -= static_cast<int64_t>(block->size);
    free_.erase(block);
    return data;
  }

  mutable std::mutex mutex_;
  std::unordered_map<void*, Used> used_;                             // large blocks
  std::list<Free> free_;                                             // large blocks kept, the oldest first
  std::map<size_t, std::deque<std::list<Free>::iterator>> by_size_;  // the same, of each size the oldest first
  std::atomic<int64_t> live_{0}, peak_{0}, cached_{0};
  int64_t highest_ = 0;
  const size_t limit_ = machine_bytes();
};

// Never destroyed: tensors may outlive static destruction.
HostAllocator& allocator() {
  static auto* instance = new HostAllocator;
  return *instance;
}

void HostAllocator::release(void* data) { allocator().give_back(data); }

}  // namespace

AccountScope::AccountScope(Account& account) : before_(current_account) { current_account = &account; }
AccountScope::~AccountScope() { current_account = before_; }

void install_host_allocator() {
  static std::once_flag once;
  std::call_once(once, [] { c10::SetCPUAllocator(&allocator(), 100); });
}
HostMemory host_memory() { return allocator().memory(); }
void reset_host_peak() { allocator().reset_peak(); }
int64_t available_host_bytes() {
  int64_t available = INT64_MAX;
  std::ifstream file("/proc/meminfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("MemAvailable:", 0) == 0) available = std::stoll(line.substr(13)) * 1024;
  const size_t limit = limit_in("/sys/fs/cgroup/memory.max"), used = limit_in("/sys/fs/cgroup/memory.current");
  if (limit != SIZE_MAX && used != SIZE_MAX)
    available = std::min(available, static_cast<int64_t>(limit) - static_cast<int64_t>(std::min(limit, used)));
  return available;
}
void trim_host_memory() { allocator().trim(); }

}  // namespace stroma::engine
