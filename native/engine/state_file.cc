#include "engine/state_file.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <thread>

#include "engine/error.h"
#include "engine/sha256.h"

namespace stroma::engine {
namespace {

class File {
 public:
  File(const std::string& path, int flags) : fd_(::open(path.c_str(), flags | O_CLOEXEC, 0644)) {
    if (fd_ < 0) refuse(path, "open");
  }
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }
  [[noreturn]] static void refuse(const std::string& path, const char* what) {
    const int error = errno;
    if (error == ENOSPC || error == EDQUOT)
      fail("DISK_FULL", "[checkpoint] the disk is full, at ", path, ". Free space or choose another folder");
    fail("CHECKPOINT", "[checkpoint] cannot ", what, " ", path, ": ", std::strerror(error));
  }

 private:
  int fd_;
};

// Writes in order and hashes what it writes.
class Sink {
 public:
  Sink(const File& file, const std::string& path) : file_(file), path_(path) {}
  void write(const void* data, int64_t bytes) {
    const char* at = static_cast<const char*>(data);
    while (bytes > 0) {
      const int64_t part = std::min<int64_t>(bytes, 8 << 20);
      hash_.update(at, static_cast<size_t>(part));
      for (int64_t left = part; left > 0;) {
        const ssize_t wrote = ::write(file_.fd(), at, static_cast<size_t>(left));
        if (wrote < 0 && errno == EINTR) continue;
        if (wrote <= 0) File::refuse(path_, "write");
        at += wrote, left -= wrote;
      }
      bytes -= part, written_ += part;
    }
  }
  void zeros(int64_t bytes) {
    const std::string blank(static_cast<size_t>(bytes), '\0');
    write(blank.data(), bytes);
  }
  int64_t written() const { return written_; }
  std::string hex() { return hash_.hex(); }

 private:
  const File& file_;
  const std::string& path_;
  Sha256 hash_;
  int64_t written_ = 0;
};

std::string key(StateKind kind, const std::string& name) { return std::string(state_kind_name(kind)) + " " + name; }

}  // namespace

Snapshot::Snapshot(const ModelState& state, const std::vector<StateKind>& kinds) : state_(state) {
  copied_ = state.fits_twice();
  const at::NoGradGuard no_grad;
  for (const Parameter& p : state.parameters)
    for (const StateKind kind : kinds)
      if (copied_ && state.holds(kind, p))
        tensors_.emplace(key(kind, p.spec.name),
                         state.tensor(kind, p).to(at::kCPU, /*non_blocking=*/false, /*copy=*/true));
}

at::Tensor Snapshot::tensor(StateKind kind, const std::string& name) const {
  if (copied_) {
    const auto it = tensors_.find(key(kind, name));
    return it == tensors_.end() ? at::Tensor() : it->second;
  }
  for (const Parameter& p : state_.parameters)
    if (p.spec.name == name && state_.holds(kind, p)) return state_.tensor(kind, p);
  return {};
}

at::Tensor Snapshot::bytes_of(const FileEntry& entry) const {
  const at::Tensor tensor = this->tensor(entry.kind, entry.name);
  if (!tensor.defined())
    fail("INVALID_ARGUMENT", "[checkpoint] the snapshot holds no ", state_kind_name(entry.kind), " of ", entry.name);
  at::Tensor bytes = tensor.to(at::kCPU, entry.dtype).contiguous();
  if (static_cast<int64_t>(bytes.nbytes()) != entry.bytes)
    fail("INVALID_ARGUMENT", "[checkpoint] entry ", entry.name, " has ", entry.bytes, " bytes, expected ",
         bytes.nbytes());
  return bytes;
}

int64_t Snapshot::write_parts(const std::string& path, const std::string& header,
                              const std::vector<FileEntry>& entries) const {
  const at::NoGradGuard no_grad;
  const File file(path, O_WRONLY | O_CREAT);
  int64_t written = 0;
  const auto put = [&](const void* data, int64_t bytes, int64_t offset) {
    const char* at = static_cast<const char*>(data);
    written += bytes;
    while (bytes > 0) {
      const ssize_t wrote = ::pwrite(file.fd(), at, static_cast<size_t>(std::min<int64_t>(bytes, 1 << 30)), offset);
      if (wrote < 0 && errno == EINTR) continue;
      if (wrote <= 0) File::refuse(path, "write");
      at += wrote, offset += wrote, bytes -= wrote;
    }
  };
  put(header.data(), static_cast<int64_t>(header.size()), 0);
  for (const FileEntry& entry : entries) put(bytes_of(entry).const_data_ptr(), entry.bytes, entry.offset);
  if (::fsync(file.fd()) != 0) File::refuse(path, "flush");
  return written;
}

Snapshot::Written Snapshot::write(const std::string& path, const std::string& header,
                                  const std::vector<FileEntry>& entries) const {
  const at::NoGradGuard no_grad;
  const File file(path, O_WRONLY | O_CREAT | O_EXCL);
  try {
    Sink sink(file, path);
    sink.write(header.data(), static_cast<int64_t>(header.size()));
    for (const FileEntry& entry : entries) {
      const at::Tensor bytes = bytes_of(entry);
      if (entry.offset < sink.written())
        fail("INVALID_ARGUMENT", "[checkpoint] entry ", entry.name, " is at ", entry.offset, ", expected ",
             sink.written(), " or later");
      sink.zeros(entry.offset - sink.written());
      sink.write(bytes.const_data_ptr(), entry.bytes);
    }
    if (::fsync(file.fd()) != 0) File::refuse(path, "flush");
    return {sink.written(), sink.hex()};
  } catch (...) {
    ::unlink(path.c_str());
    throw;
  }
}

namespace {

struct Job {
  char* target;
  int64_t offset, bytes;
};

void cut(std::vector<Job>& jobs, char* target, int64_t offset, int64_t bytes) {
  constexpr int64_t kPart = 16 << 20;
  for (int64_t at = 0; at < bytes; at += kPart) jobs.push_back({target + at, offset + at, std::min(kPart, bytes - at)});
}

void read_all(const File& file, const std::string& path, const std::vector<Job>& jobs, int threads) {
  std::atomic<size_t> next{0};
  std::atomic<int> error{0};
  const auto reader = [&] {
    for (size_t j = next++; j < jobs.size() && error == 0; j = next++) {
      Job job = jobs[j];
      while (job.bytes > 0) {
        const ssize_t got = ::pread(file.fd(), job.target, static_cast<size_t>(job.bytes), job.offset);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) {
          error = got == 0 ? EIO : errno;
          return;
        }
        job.target += got, job.offset += got, job.bytes -= got;
      }
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads && i < static_cast<int>(jobs.size()); ++i) pool.emplace_back(reader);
  reader();
  for (std::thread& t : pool) t.join();
  if (error != 0) {
    errno = error;
    File::refuse(path, "read");
  }
}

}  // namespace

void read_state(ModelState& state, const std::string& path, const std::vector<FileEntry>& entries, int threads) {
  const File file(path, O_RDONLY);
  struct stat info{};
  if (::fstat(file.fd(), &info) != 0) File::refuse(path, "examine");
  // Straight into place where that is memory and the dtype is the state's own, else through a copy that is converted.
  std::vector<Job> straight;
  std::vector<const FileEntry*> converted;
  for (const FileEntry& entry : entries) {
    const Parameter& p = state.find(entry.name);
    if (!state.holds(entry.kind, p))
      fail("CHECKPOINT", "[checkpoint] this model holds no ", state_kind_name(entry.kind), " of ", entry.name, ", at ",
           path);
    const int64_t expected =
        c10::multiply_integers(state.shape_of(entry.kind, p)) * static_cast<int64_t>(c10::elementSize(entry.dtype));
    if (entry.bytes != expected)
      fail("CHECKPOINT", "[checkpoint] expected ", expected, " bytes of ", entry.name, ", got ", entry.bytes, ", at ",
           path);
    if (entry.offset < 0 || entry.bytes > info.st_size || entry.offset > info.st_size - entry.bytes)
      fail("CHECKPOINT", "[checkpoint] ", entry.name, " lies beyond the end of ", path, " (", info.st_size,
           " bytes): the file is cut off");
    const bool has_finer = state.holds(StateKind::kMaster, p) || state.holds(StateKind::kLow, p);
    if (entry.dtype != state.dtype_of(entry.kind) || entry.kind == StateKind::kStep ||
        entry.kind == StateKind::kMaster || (entry.kind == StateKind::kParam && has_finer) ||
        !state.in_host_memory(entry.kind, p)) {
      converted.push_back(&entry);
    } else {
      at::Tensor target = state.tensor(entry.kind, p);
      cut(straight, static_cast<char*>(target.mutable_data_ptr()), entry.offset, entry.bytes);
    }
  }
  read_all(file, path, straight, threads);
  const at::NoGradGuard no_grad;
  // The finer of two copies of a parameter comes last.
  std::stable_sort(converted.begin(), converted.end(),
                   [](const FileEntry* a, const FileEntry* b) { return a->kind < b->kind; });
  for (const FileEntry* entry : converted) {
    Parameter& p = state.find(entry->name);
    const at::Tensor tensor = at::empty(state.shape_of(entry->kind, p), at::dtype(entry->dtype));
    std::vector<Job> jobs;
    cut(jobs, static_cast<char*>(tensor.mutable_data_ptr()), entry->offset, entry->bytes);
    read_all(file, path, jobs, threads);
    state.assign(entry->kind, p, tensor);
  }
}

}  // namespace stroma::engine
