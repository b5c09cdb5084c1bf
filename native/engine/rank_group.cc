#include "engine/rank_group.h"

#include <ATen/ops/empty_like.h>

#include <atomic>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <utility>

namespace stroma::engine {
namespace {

class WatchedWork final : public c10d::Work {
 public:
  // then: what is left to do on the waiting thread once the bytes are there.
  WatchedWork(c10::intrusive_ptr<c10d::Work> work, int rank, RankGroup::Wait wait, std::function<void()> then)
      : work_(std::move(work)), peer_(rank), wait_(std::move(wait)), then_(std::move(then)) {}
  // Whoever is alive is waited for, however long its own work takes: the ranks' heartbeats are the timeout.
  bool wait(std::chrono::milliseconds) override {
    wait_(*work_, peer_);
    if (then_) std::exchange(then_, nullptr)();
    return true;
  }
  void abort() override { work_->abort(); }
  bool isCompleted() override { return work_->isCompleted(); }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  int peer_;
  RankGroup::Wait wait_;
  std::function<void()> then_;
};

// Gloo moves host memory: what lies on a card goes through the host. The copies are of the current stream, and the host
// waits for them, so a pass sees its keys and values in order.
class WatchedGloo final : public c10d::Backend {
 public:
  WatchedGloo(c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo, std::vector<int> members, RankGroup::Wait wait,
              RankGroup::Lose lose)
      : Backend(gloo->getRank(), gloo->getSize()),
        gloo_(std::move(gloo)),
        members_(std::move(members)),
        wait_(std::move(wait)),
        lose_(std::move(lose)) {}

  const std::string getBackendName() const override { return "gloo, watched"; }

  c10::intrusive_ptr<c10d::Work> send(std::vector<at::Tensor>& tensors, int to, int tag) override {
    std::vector<at::Tensor> host = on_host(tensors);
    for (size_t i = 0; i < tensors.size(); ++i)
      if (!host[i].is_same(tensors[i])) host[i].copy_(tensors[i]);
    // The transfer's end keeps what it reads.
    return begin(to, [&] { return gloo_->send(host, to, tag); }, [host] {});
  }
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors, int from, int tag) override {
    std::vector<at::Tensor> host = on_host(tensors);
    return begin(
        from, [&] { return gloo_->recv(host, from, tag); },
        [host, tensors] {
          for (size_t i = 0; i < tensors.size(); ++i)
            if (!host[i].is_same(tensors[i])) tensors[i].copy_(host[i]);
        });
  }

 private:
  static std::vector<at::Tensor> on_host(const std::vector<at::Tensor>& tensors) {
    std::vector<at::Tensor> host;
    for (const at::Tensor& t : tensors)
      host.push_back(t.is_cpu() ? t : at::empty_like(t, t.options().device(at::kCPU)));
    return host;
  }

  template <class Post>
  c10::intrusive_ptr<c10d::Work> begin(int peer, Post post, std::function<void()> then) {
    const int rank = members_.at(peer);
    try {
      return c10::make_intrusive<WatchedWork>(post(), rank, wait_, std::move(then));
    } catch (const std::exception& error) {
      lose_(rank, error.what());
      throw;
    }
  }

  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo_;
  std::vector<int> members_;
  RankGroup::Wait wait_;
  RankGroup::Lose lose_;
};

}  // namespace

RegisteredGroup::RegisteredGroup(const c10::intrusive_ptr<c10d::Backend>& backend,
                                 std::initializer_list<c10::DeviceType> devices) {
  using BackendType = c10d::ProcessGroup::BackendType;
  static std::atomic<int64_t> made{0};
  name_ = "stroma/" + std::to_string(made++);
  // Nothing asks the group for its store: what it needed is in its backend.
  group_ = c10::make_intrusive<c10d::ProcessGroup>(nullptr, backend->getRank(), backend->getSize());
  for (const auto device : devices) group_->setBackend(device, BackendType::CUSTOM, backend);
  group_->setDefaultBackend(BackendType::CUSTOM);
  group_->setGroupName(name_);
  c10d::register_process_group(name_, group_);
}
RegisteredGroup::~RegisteredGroup() { c10d::unregister_process_group(name_); }

RankGroup::RankGroup(const c10::intrusive_ptr<c10d::ProcessGroupGloo>& gloo, const std::vector<int>& members, Wait wait,
                     Lose lose)
    : registered_(c10::make_intrusive<WatchedGloo>(gloo, members, std::move(wait), std::move(lose)),
                  {c10::DeviceType::CPU, c10::DeviceType::CUDA}) {}

}  // namespace stroma::engine
