#include "engine/rank_group.h"

#include <atomic>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>

namespace stroma::engine {
namespace {

class WatchedWork final : public c10d::Work {
 public:
  WatchedWork(c10::intrusive_ptr<c10d::Work> work, int rank, RankGroup::Wait wait)
      : work_(std::move(work)), peer_(rank), wait_(std::move(wait)) {}
  // Whoever is alive is waited for, however long its own work takes: the ranks' heartbeats are the timeout.
  bool wait(std::chrono::milliseconds) override {
    wait_(*work_, peer_);
    return true;
  }
  void abort() override { work_->abort(); }
  bool isCompleted() override { return work_->isCompleted(); }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  int peer_;
  RankGroup::Wait wait_;
};

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
    return begin(to, [&] { return gloo_->send(tensors, to, tag); });
  }
  c10::intrusive_ptr<c10d::Work> recv(std::vector<at::Tensor>& tensors, int from, int tag) override {
    return begin(from, [&] { return gloo_->recv(tensors, from, tag); });
  }

 private:
  template <class Post>
  c10::intrusive_ptr<c10d::Work> begin(int peer, Post post) {
    const int rank = members_.at(peer);
    try {
      return c10::make_intrusive<WatchedWork>(post(), rank, wait_);
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

RankGroup::RankGroup(const c10::intrusive_ptr<c10d::Store>& store,
                     const c10::intrusive_ptr<c10d::ProcessGroupGloo>& gloo, const std::vector<int>& members, Wait wait,
                     Lose lose) {
  using BackendType = c10d::ProcessGroup::BackendType;
  static std::atomic<int64_t> made{0};
  name_ = "stroma/" + std::to_string(made++);
  group_ = c10::make_intrusive<c10d::ProcessGroup>(store, gloo->getRank(), gloo->getSize());
  group_->setBackend(c10::DeviceType::CPU, BackendType::CUSTOM,
                     c10::make_intrusive<WatchedGloo>(gloo, members, std::move(wait), std::move(lose)));
  group_->setDefaultBackend(BackendType::CUSTOM);
  group_->setGroupName(name_);
  c10d::register_process_group(name_, group_);
}

RankGroup::~RankGroup() { c10d::unregister_process_group(name_); }

}  // namespace stroma::engine
