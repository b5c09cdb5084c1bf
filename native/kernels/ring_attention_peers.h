// Point-to-point transfers between the ranks of a c10d process group, by its interface alone: gloo, NCCL or any other
// backend that has send and recv.
#pragma once
#include <ATen/core/Tensor.h>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>

#include <string>
#include <vector>

namespace stroma {

// A contiguous tensor that goes to `peer` or comes from there. Messages of one tag between two ranks keep their order.
struct Message {
  at::Tensor tensor;
  int64_t peer;
  int tag;
};

// Transfers under way. They hold their tensors, which nobody may write (sent) or touch (received) before wait().
class Transfers {
 public:
  // Returns when all are done: on the CPU really, on a GPU for what the current stream does next. Throws
  // c10::DistBackendError that names op, rank and peer when one fails or does not end within the group's timeout.
  void wait();

 private:
  friend class Peers;
  struct Posted {
    Message message;
    bool is_send;
  };
  const class Peers* peers_ = nullptr;
  std::vector<Posted> posted_;
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;  // one for each message, or one for all of them
};

class Peers {
 public:
  // Throws where there is no group of this name, or none with a backend for `device`.
  Peers(const char* op, const std::string& group, at::Device device);

  int64_t rank() const { return rank_; }
  int64_t ranks() const { return ranks_; }

  // Posts all of them at once and returns; `this` must outlive the transfers.
  Transfers post(std::vector<Message> sends, std::vector<Message> receives) const;

  // Sends to the next rank of the ring what the previous one sends to this.
  Transfers shift(const at::Tensor& out, const at::Tensor& in, int tag) const;

  // Throws unless the previous rank of the ring gives the same numbers, `names` saying what they are. On CPU only:
  // elsewhere the host would have to wait for the device.
  void agree(const std::vector<int64_t>& numbers, const char* names) const;

 private:
  friend class Transfers;
  [[noreturn]] void fail(const Transfers::Posted& posted, const std::string& what) const;

  const char* op_;
  at::Device device_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  c10::intrusive_ptr<c10d::Backend> backend_;
  std::chrono::milliseconds timeout_;
  int64_t rank_, ranks_;
};

}  // namespace stroma
