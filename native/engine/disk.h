// The disk arena: one scratch file without a name, read and written past the page cache, several requests at a time.
//
// Contract: offsets and lengths of read() and write() are multiples of kPage and memory is page-aligned; access() takes
// any range and is for state that is looked at between steps. Each page's checksum is remembered when it is written and
// compared when it is read. The file has no name (O_TMPFILE, or unlinked at once), so nothing is left behind however
// the process ends; what must outlive a crash is a checkpoint's business.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace stroma::engine {

class Disk {
 public:
  // Throws DISK_FULL when the folder's file system cannot hold `bytes`, DATA when a file cannot be made there.
  Disk(const std::string& folder, int64_t bytes);
  ~Disk();
  Disk(const Disk&) = delete;
  Disk& operator=(const Disk&) = delete;

  void read(int64_t offset, void* data, int64_t bytes);
  void write(int64_t offset, const void* data, int64_t bytes);
  void access(int64_t offset, void* data, int64_t bytes, bool write);
  void zero(int64_t offset, int64_t bytes);  // whole pages; writes only where something was written
  int64_t bytes() const { return bytes_; }

 private:
  struct Request;
  void run(int64_t offset, char* data, int64_t bytes, bool write);
  void transfer(const Request& request);
  void serve();

  std::string folder_;
  int64_t bytes_ = 0;
  int fd_ = -1;
  std::vector<uint32_t> checksums_;  // by page; 0: never written
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::deque<Request*> queue_;
  bool stopping_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace stroma::engine
