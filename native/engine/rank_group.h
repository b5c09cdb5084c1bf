// A c10d process group over some of the ranks, for operators that find theirs by name (kernels/ring_attention.h):
// Gloo's own, but every wait ends when a rank is lost, and tensors on a card go through the host.
#pragma once
#define USE_C10D_GLOO
#include <functional>
#include <initializer_list>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <vector>

namespace stroma::engine {

// In c10d's registry from construction to destruction. The registry is the process's and ranks may share a process, so
// the name is one that no other group of this process has: it says nothing to other ranks.
class RegisteredGroup {
 public:
  RegisteredGroup(const c10::intrusive_ptr<c10d::Backend>& backend, std::initializer_list<c10::DeviceType> devices);
  ~RegisteredGroup();
  RegisteredGroup(const RegisteredGroup&) = delete;
  RegisteredGroup& operator=(const RegisteredGroup&) = delete;

  const std::string& name() const { return name_; }

 private:
  std::string name_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;  // the registry holds it weakly
};

class RankGroup {
 public:
  // Waits for a transfer with a rank of the run; throws RANKS when that or any other is lost.
  using Wait = std::function<void(c10d::Work& work, int rank)>;
  // What to throw when a transfer could not even be begun.
  using Lose = std::function<void(int rank, const char* why)>;

  // members: ranks of the run by their place in the group; `gloo` has as many, in this order.
  RankGroup(const c10::intrusive_ptr<c10d::ProcessGroupGloo>& gloo, const std::vector<int>& members, Wait wait,
            Lose lose);

  const std::string& name() const { return registered_.name(); }

 private:
  RegisteredGroup registered_;
};

}  // namespace stroma::engine
