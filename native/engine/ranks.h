// The ranks of a run: processes (or sessions of one process) that train one model together, over libtorch's own c10d:
// a TCPStore to meet at, Gloo to talk over. Everything is point to point, so that whatever waits can be ended: a rank
// that fails says so in the store, one that is silent is missed there, and then every wait throws, naming it.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/util/intrusive_ptr.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace c10d {
class Store;
}

namespace stroma::engine {

struct RankSpec {
  int rank = 0, size = 1;
  std::string address;  // of the store
  int port = 0;
  bool serve = false;  // rank 0 hosts the store, unless a launcher's agent does
  std::string prefix;  // of every key
  double join_seconds = 60;
  double silence_seconds = 30;                   // after which a rank counts as lost
  std::shared_ptr<std::atomic<bool>> cancelled;  // true: join() throws; may be null
};

// Of meetings: what tapes move, and what operators pass around in a group.
constexpr int kTapeLane = 0, kGroupLane = 1;

class Ranks {
 public:
  // Channels are independent: what is sent on one is never received on another.
  enum class Channel { kData, kEngine, kHost };

  // Returns when all ranks are there. Throws RANKS, naming which is missing after join_seconds; when cancelled.
  static std::shared_ptr<Ranks> join(const RankSpec& spec);
  virtual ~Ranks() = default;

  virtual const RankSpec& spec() const = 0;
  // Both return when the bytes are gone, or there. Between two ranks and on one channel, messages arrive in order. Any
  // thread; one sender and one receiver at a time for each channel and peer. Throw RANKS when a rank is lost.
  virtual void send(Channel channel, const at::Tensor& bytes, int peer) = 0;
  virtual void receive(Channel channel, const at::Tensor& bytes, int peer) = 0;
  // Everyone's text by rank. Collective. begin_gather() sends and does not wait; what it returns does.
  using Gathering = std::function<std::vector<std::string>()>;
  virtual Gathering begin_gather(Channel channel, const std::string& mine) = 0;
  std::vector<std::string> gather(Channel channel, const std::string& mine) { return begin_gather(channel, mine)(); }
  // Name in c10d's registry, in this process until the ranks leave, of a process group over `members` (ranks of this
  // run by their place in the group, this one among them), for operators that find their group by name. The first call
  // of each list is collective over its members; later ones give the same name. What waits in an operator ends as
  // send() and receive() do.
  virtual std::string group(const std::vector<int>& members) = 0;
  // For transfers that go another way than over these channels (nccl_line.h). Both ends of one meet here first, the
  // sender with sends = true: returns when the other is there too. Those of one lane never meet those of another; one
  // at a time for each lane, peer and direction.
  virtual void meet(int peer, bool sends, int lane) = 0;
  // A connection of its own to the store, for the n-th line from one rank to another: its keys are those that the other
  // end has at its n-th call, and no others'.
  virtual c10::intrusive_ptr<c10d::Store> line_store(int from, int to) = 0;
  // Counts them.
  virtual void moved(int64_t sent, int64_t received) = 0;
  // Such a transfer failed: the peer counts as lost, unless there is a reason already. Throws RANKS.
  [[noreturn]] virtual void lose(int peer, const std::string& why) = 0;
  // Tells the others that this rank is failing; every wait of every rank throws from now on.
  virtual void fail(const std::string& why) = 0;
  // Why every wait throws; empty while all is well.
  virtual std::string lost() const = 0;
  // The last thing a rank does when all went well. Waits for nobody.
  virtual void leave() = 0;
  // Since joining, without messages of gather() and groups.
  virtual int64_t sent_bytes() const = 0;
  virtual int64_t received_bytes() const = 0;
};

}  // namespace stroma::engine
