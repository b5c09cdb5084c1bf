#include "kernels/ring_attention_peers.h"

#include <ATen/Functions.h>
#include <c10/util/Exception.h>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

namespace stroma {
namespace {

constexpr int kAgreeTag = 0x5354'0000;

// The backend's own timeout. A GPU's work is not waited for on the host (its wait orders streams); there the backend's
// watchdog applies the same timeout.
std::chrono::milliseconds timeout_of(c10d::Backend& backend, at::Device device) {
  if (!device.is_cpu()) return kNoTimeout;
  try {
    return backend.getBackendOptions()->timeout;
  } catch (const c10::Error&) {
    return kNoTimeout;  // a backend without options: its default
  }
}

// libtorch's errors carry a stack trace in what().
std::string text_of(const std::exception& e) {
  const auto* error = dynamic_cast<const c10::Error*>(&e);
  return error ? error->what_without_backtrace() : e.what();
}

}  // namespace

Peers::Peers(const char* op, const std::string& group, at::Device device) : op_(op), device_(device) {
  try {
    group_ = c10d::resolve_process_group(group);
    backend_ = group_->getBackend(device.type());
  } catch (const std::exception& e) {
    TORCH_CHECK(false, "[stroma::", op, "] expected the name of a process group with a backend for ", device.type(),
                ", got \"", group, "\": ", text_of(e));
  }
  timeout_ = timeout_of(*backend_, device);
  rank_ = group_->getRank();
  ranks_ = group_->getSize();
}

void Peers::fail(const Transfers::Posted& posted, const std::string& what) const {
  C10_THROW_ERROR(DistBackendError,
                  c10::str("[stroma::", op_, "] rank ", rank_, " of ", ranks_, " could not ",
                           posted.is_send ? "send to" : "receive from", " rank ", posted.message.peer, " (",
                           posted.message.tensor.nbytes(), " bytes, tag ", posted.message.tag, "): ", what,
                           ". The group's ranks are out of step now: see the first error among them, then start anew"));
}

Transfers Peers::post(std::vector<Message> sends, std::vector<Message> receives) const {
  Transfers transfers;
  transfers.peers_ = this;
  for (auto* messages : {&receives, &sends})
    for (Message& m : *messages) transfers.posted_.push_back({std::move(m), messages == &sends});
  // NCCL runs messages between two ranks one after the other unless they are grouped: all would send first and wait.
  const bool grouped = backend_->supportsCoalescing();
  const Transfers::Posted* current = &transfers.posted_.front();
  try {
    if (grouped) group_->startCoalescing(device_.type());
    for (const auto& posted : transfers.posted_) {
      current = &posted;
      std::vector<at::Tensor> tensors{posted.message.tensor};
      const int peer = static_cast<int>(posted.message.peer), tag = posted.message.tag;
      auto work = posted.is_send ? group_->send(tensors, peer, tag) : group_->recv(tensors, peer, tag);
      if (!grouped) transfers.works_.push_back(std::move(work));
    }
    if (grouped) transfers.works_ = {group_->endCoalescing(device_.type())};
  } catch (const std::exception& e) {
    fail(*current, text_of(e));
  }
  return transfers;
}

void Transfers::wait() {
  for (size_t i = 0; i < works_.size(); ++i) {
    std::string what = "it was aborted";
    bool done = false;
    try {
      done = works_[i]->wait(peers_->timeout_);
    } catch (const std::exception& e) {
      what = text_of(e);
    }
    if (!done) peers_->fail(posted_[i], what);
  }
  works_.clear();
  posted_.clear();
}

Transfers Peers::shift(const at::Tensor& out, const at::Tensor& in, int tag) const {
  return post({{out, (rank_ + 1) % ranks_, tag}}, {{in, (rank_ + ranks_ - 1) % ranks_, tag}});
}

void Peers::agree(const std::vector<int64_t>& numbers, const char* names) const {
  if (!device_.is_cpu()) return;
  const at::Tensor mine = at::tensor(numbers, at::kLong), theirs = at::empty_like(mine);
  shift(mine, theirs, kAgreeTag).wait();
  const int64_t* got = theirs.const_data_ptr<int64_t>();
  TORCH_CHECK(std::equal(numbers.begin(), numbers.end(), got), "[stroma::", op_, "] expected the same (", names,
              ") on every rank, got ", at::IntArrayRef(numbers), " on rank ", rank_, " and ",
              at::IntArrayRef(got, numbers.size()), " on rank ", (rank_ + ranks_ - 1) % ranks_);
}

}  // namespace stroma
