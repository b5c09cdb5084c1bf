#include "engine/shared_memory.h"

#include <ATen/Functions.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <sstream>

#include "engine/cuda_device.h"
#include "engine/error.h"
#include "engine/host_allocator.h"
#include "engine/layout.h"
#include "engine/numa.h"

namespace stroma::engine {
namespace {

constexpr auto kChannel = Ranks::Channel::kEngine;
constexpr int64_t kMessageBytes = 1024;

void say(Ranks& ranks, int peer, const std::string& text) {
  const at::Tensor bytes = at::zeros({kMessageBytes}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr(), text.data(), std::min<size_t>(text.size(), kMessageBytes - 1));
  ranks.send(kChannel, bytes, peer);
}
std::string hear(Ranks& ranks, int peer) {
  const at::Tensor bytes = at::empty({kMessageBytes}, at::kByte);
  ranks.receive(kChannel, bytes, peer);
  const char* text = static_cast<const char*>(bytes.const_data_ptr());
  return {text, strnlen(text, kMessageBytes)};
}

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

std::string reason() { return std::strerror(errno); }

// A rank that cannot go on throws only once all have heard of it.
struct Verdict {
  const char* code = nullptr;
  std::string why;
  void fail_with(const char* with, const std::string& because) {
    if (code != nullptr) return;
    code = with;
    why = because;
  }
};
constexpr const char* kCures =
    ". Leave it off with --shared-host off (sharedHost \"off\"): parts then go from rank to rank";

std::string told(const Verdict& verdict) {
  return verdict.code == nullptr ? "" : std::string(verdict.code) + " " + verdict.why;
}
Verdict understood(const std::string& text) {
  Verdict verdict;
  if (!text.empty())
    verdict.fail_with(text.rfind("OUT_OF_MEMORY ", 0) == 0 ? "OUT_OF_MEMORY" : "CONFIG",
                      text.substr(text.find(' ') + 1));
  return verdict;
}

// nodes: of memory, for who maps it first; the policy is the file's from then on.
at::Tensor map(int fd, int64_t bytes, bool pinned, Verdict& verdict, const std::vector<int>& nodes = {}) {
  const auto size = static_cast<size_t>(bytes);
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (data == MAP_FAILED) {
    verdict.fail_with("OUT_OF_MEMORY", "[plan] " + std::to_string(bytes) +
                                           " bytes of host memory that ranks share cannot be mapped: " + reason() +
                                           ". Plan with less host memory");
    return {};
  }
  ::madvise(data, size, MADV_HUGEPAGE);
  if (nodes.size() > 1) numa::interleave(data, size, nodes);
  if (pinned) {
    try {
      cuda::pin(data, bytes);
    } catch (const Error& error) {
      ::munmap(data, size);
      verdict.fail_with("OUT_OF_MEMORY", error.what());
      return {};
    }
  }
  return at::from_blob(
      data, {bytes},
      [size, pinned](void* at) {
        if (pinned) cuda::unpin(at);
        ::munmap(at, size);
      },
      at::TensorOptions().dtype(at::kByte));
}

// The memory, and by what others find it: "process descriptor device inode".
int create(int64_t bytes, Verdict& verdict, std::string& offer) {
  const int64_t available = available_host_bytes();
  if (bytes > available) {
    verdict.fail_with("OUT_OF_MEMORY", "[plan] " + std::to_string(bytes) +
                                           " bytes of host memory that ranks share were planned, and " +
                                           std::to_string(available) + " are available. Plan with less host memory");
    return -1;
  }
  const int fd = ::memfd_create("stroma", MFD_CLOEXEC);
  struct stat found{};
  if (fd < 0 || ::ftruncate(fd, bytes) != 0 || ::fstat(fd, &found) != 0) {
    verdict.fail_with("CONFIG", "[ranks] this system gives no memory that ranks could share: " + reason() + kCures);
    return fd;
  }
  std::ostringstream text;
  text << getpid() << ' ' << fd << ' ' << found.st_dev << ' ' << found.st_ino;
  offer = text.str();
  return fd;
}

// The first one's memory, through what the kernel shows of its process.
int open_offered(const std::string& offer, int first, Verdict& verdict) {
  std::istringstream text(offer);
  int64_t process = 0;
  int theirs = -1;
  uint64_t device = 0, inode = 0;
  text >> process >> theirs >> device >> inode;
  const std::string path = "/proc/" + std::to_string(process) + "/fd/" + std::to_string(theirs);
  const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  const std::string why = fd < 0 ? reason() : "";
  struct stat found{};
  const bool same = fd >= 0 && ::fstat(fd, &found) == 0 && found.st_dev == device && found.st_ino == inode;
  if (!same)
    verdict.fail_with(
        "CONFIG", "[ranks] the host memory of rank " + std::to_string(first) + " (process " + std::to_string(process) +
                      ") cannot be shared: " + (fd < 0 ? why : std::string("that process is another one here")) +
                      ". Ranks share memory under one user and in one container" + kCures);
  return fd;
}

}  // namespace

at::Tensor shared_bytes(Ranks& ranks, const std::vector<int>& members, int64_t planned, bool pinned) {
  const int64_t bytes = round_up(planned, kPage);
  const int self = ranks.spec().rank, first = members.front();
  Verdict verdict;
  at::Tensor mapped;
  if (self != first) {
    const std::string offer = hear(ranks, first);
    if (!offer.empty()) {
      const File file(open_offered(offer, first, verdict));
      if (verdict.code == nullptr) mapped = map(file.get(), bytes, pinned, verdict);
    }
    say(ranks, first, told(verdict));
    verdict = understood(hear(ranks, first));
  } else {
    // Open until all have it: what is mapped needs no descriptor.
    std::string offer;
    const File file(create(bytes, verdict, offer));
    if (verdict.code == nullptr) mapped = map(file.get(), bytes, pinned, verdict, numa::nodes());
    if (verdict.code != nullptr) offer.clear();
    for (const int member : members)
      if (member != self) say(ranks, member, offer);
    for (const int member : members) {
      if (member == self) continue;
      const Verdict theirs = understood(hear(ranks, member));
      if (theirs.code != nullptr) verdict.fail_with(theirs.code, theirs.why);
    }
    for (const int member : members)
      if (member != self) say(ranks, member, told(verdict));
  }
  if (verdict.code != nullptr) fail(verdict.code, verdict.why);
  return mapped;
}

}  // namespace stroma::engine
