// State to and from byte ranges of files. What the bytes mean (safetensors) is decided in TypeScript; here they move.
#pragma once
#include <string>
#include <vector>

#include "engine/state.h"

namespace stroma::engine {

struct FileEntry {
  StateKind kind;
  std::string name;
  at::ScalarType dtype;  // in the file
  int64_t offset, bytes;
};

// The state at one step boundary, to be written. A copy, so that training may go on meanwhile, where memory holds the
// state twice; else the state itself, and nothing may train before all is written.
class Snapshot {
 public:
  Snapshot(const ModelState& state, const std::vector<StateKind>& kinds);
  bool copied() const { return copied_; }
  struct Written {
    int64_t bytes;
    std::string sha256;
  };
  // header, then the entries at their offsets (ascending, gaps are zeros), then fsync. On failure the file is removed.
  // Throws DISK_FULL, CHECKPOINT. Any thread when copied, else the session's.
  Written write(const std::string& path, const std::string& header, const std::vector<FileEntry>& entries) const;
  // The same into a file that several ranks write at once, each its own ranges and one the header; returns its bytes.
  // Who has all that was written hashes it.
  int64_t write_parts(const std::string& path, const std::string& header, const std::vector<FileEntry>& entries) const;

 private:
  at::Tensor tensor(StateKind kind, const std::string& name) const;
  at::Tensor bytes_of(const FileEntry& entry) const;
  const ModelState& state_;  // looked at only when not copied
  bool copied_;
  std::unordered_map<std::string, at::Tensor> tensors_;  // "kind name"
};

// Reads the ranges into the state with `threads` readers. Throws CHECKPOINT when one lies outside the file or does not
// fit the state; parameters may then be partly read.
void read_state(ModelState& state, const std::string& path, const std::vector<FileEntry>& entries, int threads);

}  // namespace stroma::engine
