#include "engine/disk.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "engine/error.h"
#include "engine/layout.h"

namespace stroma::engine {
namespace {

constexpr int kThreads = 4;  // requests in flight
constexpr int64_t kPart = 4 << 20;

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) uint32_t crc_hardware(const char* data) {
  uint64_t crc = ~0u;
  for (int64_t i = 0; i < kPage; i += 8) {
    uint64_t word;
    std::memcpy(&word, data + i, 8);
    crc = __builtin_ia32_crc32di(crc, word);
  }
  return static_cast<uint32_t>(crc);
}
#endif

// CRC-32C of a page (Castagnoli polynomial, reflected), never 0.
uint32_t page_checksum(const char* data) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("sse4.2")) return crc_hardware(data) | 1u;
#endif
  static const auto table = [] {
    std::vector<uint32_t> t(256);
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c & 1) != 0 ? 0x82f63b78u ^ (c >> 1) : c >> 1;
      t[i] = c;
    }
    return t;
  }();
  uint32_t crc = ~0u;
  for (int64_t i = 0; i < kPage; ++i) crc = table[(crc ^ static_cast<uint8_t>(data[i])) & 255] ^ (crc >> 8);
  return crc | 1u;
}

struct FreeAligned {
  void operator()(void* data) const { std::free(data); }
};

}  // namespace

struct Disk::Request {
  int64_t offset;
  char* data;
  int64_t bytes;
  bool write;
  int* left;
  int error = 0;
  bool damaged = false;
};

Disk::Disk(const std::string& folder, int64_t bytes) : folder_(folder), bytes_(round_up(bytes, kPage)) {
  struct statvfs info{};
  if (::statvfs(folder.c_str(), &info) != 0)
    fail("DATA", "[disk] expected a folder for state on disk at ", folder, ": ", std::strerror(errno),
         ". Make it, or name another");
  const int64_t free = static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
  if (free < bytes_)
    fail("DISK_FULL", "[disk] the plan places ", bytes_, " bytes in ", folder, ", which has ", free,
         " free. Free space, name another folder, or place less on disk");
  const auto make = [&](int flags) {
    int fd = ::open(folder.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | flags, 0600);
    if (fd >= 0 || (errno != EOPNOTSUPP && errno != EISDIR && errno != ENOENT)) return fd;
    std::string name = folder + "/stroma-XXXXXX";
    fd = ::mkostemp(name.data(), O_CLOEXEC | flags);
    if (fd >= 0) ::unlink(name.c_str());
    return fd;
  };
  fd_ = make(O_DIRECT);
  if (fd_ < 0) fd_ = make(0);  // tmpfs knows no O_DIRECT
  if (fd_ < 0)
    fail("DATA", "[disk] cannot make a file for state in ", folder, ": ", std::strerror(errno),
         ". Name another folder");
  // The room is taken now: a full disk is an error here, not in the middle of a step.
  const int reserved = ::posix_fallocate(fd_, 0, bytes_);
  if (reserved == ENOSPC || reserved == EDQUOT || reserved == EFBIG) {
    ::close(fd_);
    fail("DISK_FULL", "[disk] ", folder, " cannot hold ", bytes_, " bytes: ", std::strerror(reserved));
  }
  if (reserved != 0 && ::ftruncate(fd_, bytes_) != 0) {
    ::close(fd_);
    fail("DATA", "[disk] cannot size a file in ", folder, ": ", std::strerror(errno));
  }
  checksums_.assign(static_cast<size_t>(bytes_ / kPage), 0);
  for (int i = 0; i < kThreads; ++i) threads_.emplace_back([this] { serve(); });
}

Disk::~Disk() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  if (fd_ >= 0) ::close(fd_);
}

void Disk::serve() {
  std::unique_lock lock(mutex_);
  for (;;) {
    wake_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (queue_.empty()) return;
    Request* request = queue_.front();
    queue_.pop_front();
    lock.unlock();
    transfer(*request);
    lock.lock();
    if (--*request->left == 0) done_.notify_all();
  }
}

void Disk::transfer(const Request& given) {
  Request& request = const_cast<Request&>(given);
  const size_t first = static_cast<size_t>(request.offset / kPage), pages = static_cast<size_t>(request.bytes / kPage);
  if (request.write)
    for (size_t p = 0; p < pages; ++p) checksums_[first + p] = page_checksum(request.data + p * kPage);
  for (int64_t at = 0; at < request.bytes;) {
    const auto size = static_cast<size_t>(request.bytes - at);
    const ssize_t moved = request.write ? ::pwrite(fd_, request.data + at, size, request.offset + at)
                                        : ::pread(fd_, request.data + at, size, request.offset + at);
    if (moved < 0 && errno == EINTR) continue;
    if (moved <= 0) {
      request.error = moved == 0 ? EIO : errno;
      return;
    }
    at += moved;
  }
  if (request.write) return;
  for (size_t p = 0; p < pages; ++p) {
    const uint32_t expected = checksums_[first + p];
    if (expected != 0 && page_checksum(request.data + p * kPage) != expected) request.damaged = true;
  }
}

void Disk::run(int64_t offset, char* data, int64_t bytes, bool write) {
  if (bytes == 0) return;
  if (offset < 0 || bytes < 0 || offset > bytes_ - bytes || offset % kPage != 0 || bytes % kPage != 0)
    fail("TAPE", "[disk] bytes ", offset, " to ", offset + bytes, " are not whole pages of ", bytes_);
  std::vector<Request> requests;
  int left = 0;
  for (int64_t at = 0; at < bytes; at += kPart)
    requests.push_back({offset + at, data + at, std::min(kPart, bytes - at), write, &left});
  left = static_cast<int>(requests.size());
  {
    std::unique_lock lock(mutex_);
    for (Request& request : requests) queue_.push_back(&request);
    wake_.notify_all();
    done_.wait(lock, [&left] { return left == 0; });
  }
  for (const Request& request : requests) {
    if (request.error == ENOSPC || request.error == EDQUOT)
      fail("DISK_FULL", "[disk] the disk of ", folder_, " is full. Free space, or place less on disk");
    if (request.error != 0)
      fail("DATA", "[disk] cannot ", write ? "write" : "read", " ", request.bytes, " bytes at ", request.offset,
           " of the scratch file in ", folder_, ": ", std::strerror(request.error));
    if (request.damaged)
      fail("DATA", "[disk] bytes ", request.offset, " to ", request.offset + request.bytes, " of the scratch file in ",
           folder_,
           " are not what was written there: the disk is failing. Resume from the last checkpoint, on another");
  }
}

void Disk::read(int64_t offset, void* data, int64_t bytes) { run(offset, static_cast<char*>(data), bytes, false); }
void Disk::write(int64_t offset, const void* data, int64_t bytes) {
  run(offset, const_cast<char*>(static_cast<const char*>(data)), bytes, true);
}

void Disk::zero(int64_t offset, int64_t bytes) {
  const int64_t part = std::min(kPart, bytes);
  std::unique_ptr<char, FreeAligned> pages;
  for (int64_t at = 0; at < bytes; at += part) {
    const int64_t size = std::min(part, bytes - at);
    const auto first = checksums_.begin() + (offset + at) / kPage;
    if (std::all_of(first, first + size / kPage, [](uint32_t c) { return c == 0; })) continue;
    if (!pages) {
      pages.reset(static_cast<char*>(std::aligned_alloc(static_cast<size_t>(kPage), static_cast<size_t>(part))));
      if (!pages) fail("OUT_OF_MEMORY", "[disk] no memory for ", part, " bytes");
      std::memset(pages.get(), 0, static_cast<size_t>(part));
    }
    write(offset + at, pages.get(), size);
  }
}

void Disk::access(int64_t offset, void* data, int64_t bytes, bool write) {
  if (bytes == 0) return;
  const int64_t begin = offset / kPage * kPage, end = round_up(offset + bytes, kPage);
  const std::unique_ptr<char, FreeAligned> pages(
      static_cast<char*>(std::aligned_alloc(static_cast<size_t>(kPage), static_cast<size_t>(end - begin))));
  if (!pages) fail("OUT_OF_MEMORY", "[disk] no memory for ", end - begin, " bytes of state");
  if (!write) {
    run(begin, pages.get(), end - begin, false);
    std::memcpy(data, pages.get() + (offset - begin), static_cast<size_t>(bytes));
    return;
  }
  // The pages at both ends are shared with what lies beside the range.
  run(begin, pages.get(), kPage, false);
  if (end - begin > kPage) run(end - kPage, pages.get() + (end - begin - kPage), kPage, false);
  std::memcpy(pages.get() + (offset - begin), data, static_cast<size_t>(bytes));
  run(begin, pages.get(), end - begin, true);
}

}  // namespace stroma::engine
