#include "engine/ranks.h"

#include <ATen/Functions.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <optional>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "engine/error.h"
#include "engine/network.h"
#include "engine/rank_group.h"
#include "engine/ranks_watch.h"

namespace stroma::engine {
namespace {

constexpr int kChannels = 3;

bool serves(const RankSpec& spec) { return spec.serve && spec.rank == 0; }

void unless_cancelled(const RankSpec& spec, const char* during) {
  if (spec.cancelled && *spec.cancelled) fail("RANKS", "[ranks] rank ", spec.rank, " was asked to end ", during);
}

// In the rank that serves it the store itself, and a way there that no network has to do with.
c10::intrusive_ptr<c10d::Store> connect_store(const RankSpec& spec, bool serve, Clock::time_point deadline) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(spec.port);
  options.isServer = serve;
  options.waitWorkers = false;
  options.useLibUV = false;  // libtorch's libuv would bind to Node's
  if (serve) options.masterListenFd = listen_at(spec.address, spec.port);
  const std::string at = !serves(spec) ? spec.address : spec.address == "::1" ? "::1" : "127.0.0.1";
  for (;;) {
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - Clock::now());
    options.timeout = std::clamp(left, milliseconds(100), milliseconds(2000));
    try {
      auto store = c10::make_intrusive<c10d::TCPStore>(at, options);
      store->setTimeout(to_ms(spec.join_seconds));
      return c10::make_intrusive<c10d::PrefixStore>(spec.prefix + "stroma", store);
    } catch (const std::exception& error) {
      unless_cancelled(spec, "while it looked for the store");
      if (serves(spec) || Clock::now() >= deadline)
        fail("RANKS", "[ranks] rank ", spec.rank, " found no store at ", spec.address, ":", spec.port, " in ",
             spec.join_seconds, " s: ", first_line(error.what()), ". Check that rank 0 runs and that the port is open");
      std::this_thread::sleep_for(milliseconds(100));
    }
  }
}

c10::intrusive_ptr<c10d::Store> part_of(const c10::intrusive_ptr<c10d::Store>& store, int64_t generation) {
  return c10::make_intrusive<c10d::PrefixStore>("generation" + std::to_string(generation), store);
}

// The address that the others reach this rank at, of what all said of the way that they come to the store by.
std::string own_address(const std::vector<std::string>& ways, int rank) {
  const std::string& own = ways[rank];
  if (!own.empty() && !is_loopback(own)) return own;
  // A machine may know its own name as the loopback (Debian's 127.0.1.1), and rank 0 has no way to what it serves.
  // Others show which network the run is on; where all are on the loopback, they are on this machine.
  std::string other;
  for (int r = 0; r < static_cast<int>(ways.size()); ++r)
    if (r != rank && !ways[r].empty() && (other.empty() || (is_loopback(other) && !is_loopback(ways[r]))))
      other = ways[r];
  if (other.empty() || (is_loopback(other) && !own.empty())) return own.empty() ? "127.0.0.1" : own;
  const std::string way = way_to(other);
  if (way.empty())
    fail("RANKS", "[ranks] rank ", rank, " has no way to ", other, ". Check the network of this machine");
  return way;
}

std::string unconnected(const RankSpec& spec, const std::string& by) {
  return "[ranks] rank " + std::to_string(spec.rank) + " by " + by + " could not connect to all others";
}
constexpr const char* kCheckNetwork = ". Check that the ranks' machines reach each other";

class Joined final : public Ranks {
  struct Moving {
    c10::intrusive_ptr<c10d::Work> work;
    at::Tensor bytes;
    int peer;
  };

 public:
  Joined(const RankSpec& spec, std::shared_ptr<Watch> watch) : spec_(spec), watch_(std::move(watch)) {
    const auto deadline = Clock::now() + to_ms(spec.join_seconds);
    generation_ = meet(deadline);
    std::vector<std::string> ways;
    for (int r = 0; r < spec.size; ++r) {
      watch_->names.push_back("rank " + std::to_string(r) + " (" + text_of(store_->get(key("here", r))) + ")");
      ways.push_back(text_of(store_->get(key("way", r))));
    }
    watch_->spec = spec;
    watch_->store = part_of(connect_store(spec, false, deadline), generation_);
    watchers_.emplace(watch_);
    own_ = own_address(ways, spec.rank);
    connect();
  }

  const RankSpec& spec() const override { return spec_; }

  std::string group(const std::vector<int>& members) override {
    const std::lock_guard lock(grouping_);
    const auto known = made_.find(members);
    if (known != made_.end()) return known->second->name();
    std::string list;
    for (const int member : members) list += (list.empty() ? "" : ",") + std::to_string(member);
    const auto place = std::find(members.begin(), members.end(), spec_.rank);
    std::vector<int> sorted = members;
    std::sort(sorted.begin(), sorted.end());
    if (place == members.end() || sorted.front() < 0 || sorted.back() >= spec_.size ||
        std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end())
      engine::fail("RANKS", "[ranks] expected a group of different ranks from 0 to ", spec_.size - 1,
                   " that holds rank ", spec_.rank, ", got ", list);
    if (const std::string why = lost(); !why.empty()) engine::fail("RANKS", why);
    try {
      // A connection of its own: who waits for the others on it would hold up fail() and leave().
      const auto store = part_of(connect_store(spec_, false, Clock::now() + to_ms(spec_.join_seconds)), generation_);
      const auto channel =
          gloo(store, "group/" + list, static_cast<int>(place - members.begin()), static_cast<int>(members.size()));
      auto made = std::make_unique<RankGroup>(
          channel, members, [watch = watch_](c10d::Work& work, int rank) { watch->finish(work, rank); },
          [watch = watch_](int rank, const char* why) { watch->lose_peer(rank, why); });
      return made_.emplace(members, std::move(made)).first->second->name();
    } catch (const std::exception& error) {
      if (const std::string why = lost(); !why.empty()) engine::fail("RANKS", why);
      engine::fail("RANKS", "[ranks] rank ", spec_.rank, " by ", way(), " could not connect to the group of ranks ",
                   list, ": ", first_line(error.what()));
    }
  }

  void send(Channel channel, const at::Tensor& bytes, int peer) override {
    sent_ += bytes.numel();
    move(channel, bytes, peer, /*out=*/true, 0);
  }
  void receive(Channel channel, const at::Tensor& bytes, int peer) override {
    move(channel, bytes, peer, /*out=*/false, 0);
    received_ += bytes.numel();
  }

  Gathering begin_gather(Channel channel, const std::string& mine) override {
    const auto options = at::dtype(at::kByte);
    const at::Tensor length = at::scalar_tensor(static_cast<int64_t>(mine.size()), at::kLong).view({1}).view(at::kByte);
    const at::Tensor text = at::empty({static_cast<int64_t>(mine.size())}, options);
    std::memcpy(text.mutable_data_ptr(), mine.data(), mine.size());
    // A send ends when its receiver asks for it, which may be when it has heard from this rank: what is sent here is
    // waited for before the next gathering, or when this rank leaves.
    std::vector<Moving>& owed = owed_[static_cast<int>(channel)];
    settle(owed);
    for (int step = 1; step < spec_.size; ++step) {
      const int peer = (spec_.rank + step) % spec_.size;
      owed.push_back(post(channel, length, peer, true, 1));
      if (!mine.empty()) owed.push_back(post(channel, text, peer, true, 2));
    }
    return [this, channel, mine] { return finish_gather(channel, mine); };
  }

  std::vector<std::string> finish_gather(Channel channel, const std::string& mine) {
    const auto options = at::dtype(at::kByte);
    std::vector<std::string> all(spec_.size);
    all[spec_.rank] = mine;
    for (int step = 1; step < spec_.size; ++step) {
      const int peer = (spec_.rank + spec_.size - step) % spec_.size;
      const at::Tensor size = at::empty({8}, options);
      move(channel, size, peer, false, 1);
      const int64_t n = size.view(at::kLong).item<int64_t>();
      if (n < 0 || n > (int64_t{1} << 32)) engine::fail("RANKS", "[ranks] ", name(peer), " sent a message of no sense");
      const at::Tensor body = at::empty({n}, options);
      if (n > 0) move(channel, body, peer, false, 2);
      all[peer].assign(static_cast<const char*>(body.const_data_ptr()), static_cast<size_t>(n));
    }
    return all;
  }
  void settle(std::vector<Moving>& owed) {
    for (Moving& moving : owed) finish(moving);
    owed.clear();
  }

  void meet(int peer, bool sends, int lane) override {
    move(Channel::kData, at::zeros({1}, at::kByte), peer, /*out=*/!sends, 3 + lane);
  }
  c10::intrusive_ptr<c10d::Store> line_store(int from, int to) override {
    const std::string line = std::to_string(from) + "/" + std::to_string(to);
    int made = 0;
    {
      const std::lock_guard lock(grouping_);
      made = lines_[line]++;
    }
    const auto store = connect_store(spec_, false, Clock::now() + to_ms(spec_.silence_seconds));
    return c10::make_intrusive<c10d::PrefixStore>("line/" + line + "/" + std::to_string(made),
                                                  part_of(store, generation_));
  }
  void moved(int64_t sent, int64_t received) override {
    sent_ += sent;
    received_ += received;
  }
  void lose(int peer, const std::string& why) override { watch_->lose_peer(peer, why.c_str()); }

  void fail(const std::string& why) override {
    try {
      store_->set(key("last", spec_.rank), bytes_of(why.empty() ? "no reason given" : why));
    } catch (const std::exception&) {
      // The store is gone with its rank, and that is what the others see.
    }
    watch_->lose("[ranks] this rank failed: " + why);
  }

  std::string lost() const override {
    const std::lock_guard lock(watch_->mutex);
    return watch_->lost;
  }

  void leave() override {
    try {
      for (auto& owed : owed_) settle(owed);
    } catch (const Error&) {
      // Whoever was lost will not read it.
    }
    {
      const std::lock_guard lock(grouping_);
      made_.clear();
    }
    bool well = false;
    {
      const std::lock_guard lock(watch_->mutex);
      if (watch_->over) return;
      watch_->over = true;
      watch_->changed.notify_all();
      well = watch_->lost.empty();
    }
    try {
      // After fail() its reason is the last word.
      if (well) store_->set(key("last", spec_.rank), bytes_of("left"));
      // Whoever serves the store leaves last, or the others would miss it, or not read why it failed.
      if (serves(spec_)) hear_out(well ? to_ms(std::min(10.0, spec_.silence_seconds)) : 4 * kBeat);
    } catch (const std::exception&) {
    }
  }

  int64_t sent_bytes() const override { return sent_; }
  int64_t received_bytes() const override { return received_; }

 private:
  static std::string key(const char* what, int rank) { return std::string(what) + "/" + std::to_string(rank); }
  const std::string& name(int peer) const { return watch_->names.at(peer); }

  // Takes this rank's place in the store and waits until all have theirs. The store may hold an earlier start of the
  // same run: an agent's outlives the ranks, and a rank that is started again may find that of a rank 0 that is ending.
  // So rank 0 begins a generation, and whoever finds its place taken waits for the next one, or the next store.
  int64_t meet(Clock::time_point deadline) {
    const std::string token = std::to_string(getpid()) + "." + std::to_string(Clock::now().time_since_epoch().count());
    c10::intrusive_ptr<c10d::Store> store;
    int64_t generation = 0;
    int there = 0;
    bool taken = false;
    for (;; std::this_thread::sleep_for(milliseconds(20))) {
      if (!store) {
        store = connect_store(spec_, serves(spec_), deadline);
        generation = 0;
      }
      try {
        const int64_t now = store->add("generation", spec_.rank == 0 && generation == 0 ? 1 : 0);
        if (now != generation) {
          generation = now;
          store_ = part_of(store, generation);
          there = 0;
          taken = text_of(store_->compareSet(key("claim", spec_.rank), {}, bytes_of(token))) != token;
          if (!taken) {
            store_->set(key("beat", spec_.rank), bytes_of("0"));
            store_->set(key("last", spec_.rank), bytes_of(""));
            store_->set(key("way", spec_.rank), bytes_of(serves(spec_) ? "" : way_to(spec_.address)));
            store_->set(key("here", spec_.rank), bytes_of(host_name() + ", process " + std::to_string(getpid())));
          }
        }
        while (generation > 0 && there < spec_.size && store_->check({key("here", there)})) ++there;
        if (there == spec_.size && !taken) return generation;
      } catch (const std::exception&) {
        store.reset();  // who served it has ended: the next store is waited for
      }
      unless_cancelled(spec_, "while it waited for the others");
      if (Clock::now() <= deadline) continue;
      if (taken)
        engine::fail(
            "RANKS", "[ranks] there is a rank ", spec_.rank, " at ", spec_.address, ":", spec_.port,
            " already. Check that no two processes were given one rank, and that the run before this has ended");
      engine::fail("RANKS", "[ranks] rank ", spec_.rank, " waited ", spec_.join_seconds, " s for rank ", there, " at ",
                   spec_.address, ":", spec_.port, ". Check that all ", spec_.size, " ranks were started");
    }
  }

  static const char* interface() {
    const char* name = std::getenv("GLOO_SOCKET_IFNAME");
    return name != nullptr && *name != 0 ? name : nullptr;
  }
  // By which the others reach this rank.
  std::string way() const {
    return interface() == nullptr ? own_ : "interface " + std::string(interface()) + " (GLOO_SOCKET_IFNAME)";
  }
  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo(const c10::intrusive_ptr<c10d::Store>& store,
                                                  const std::string& prefix, int rank, int size) const {
    auto options = c10d::ProcessGroupGloo::Options::create(to_ms(spec_.silence_seconds + 5));
    options->threads = 1;
    options->devices.push_back(interface() != nullptr ? c10d::ProcessGroupGloo::createDeviceForInterface(interface())
                                                      : c10d::ProcessGroupGloo::createDeviceForHostname(own_));
    return c10::make_intrusive<c10d::ProcessGroupGloo>(c10::make_intrusive<c10d::PrefixStore>(prefix, store), rank,
                                                       size, std::move(options));
  }

  // Gloo tries several times for as long as it may. Whoever waits for this rank's joining ends it sooner.
  void connect() {
    const std::string by = way();
    watch_->set_connecting(by);
    try {
      for (int c = 0; c < kChannels; ++c)
        channels_[c] = gloo(store_, "channel" + std::to_string(c), spec_.rank, spec_.size);
    } catch (const std::exception& error) {
      std::string why = lost();
      if (why.empty()) {
        why = unconnected(spec_, by) + ": " + first_line(error.what()) + kCheckNetwork;
        fail(why);
      }
      leave();
      engine::fail("RANKS", why);
    }
    watch_->set_connecting("");
  }

  // Waits until all others that can have said their last word.
  void hear_out(milliseconds most) {
    const auto deadline = Clock::now() + most;
    std::set<int> gone;
    {
      const std::lock_guard lock(watch_->mutex);
      gone = watch_->gone;
    }
    for (int r = 1; r < spec_.size; ++r)
      while (gone.count(r) == 0 && text_of(store_->get(key("last", r))).empty() && Clock::now() < deadline)
        std::this_thread::sleep_for(milliseconds(20));
  }

  Moving post(Channel channel, const at::Tensor& bytes, int peer, bool out, int tag) {
    const int c = static_cast<int>(channel);
    std::vector<at::Tensor> list{bytes};
    try {
      const std::lock_guard lock(posting_[c]);
      Moving moving{out ? channels_[c]->send(list, peer, tag) : channels_[c]->recv(list, peer, tag), bytes, peer};
      return moving;
    } catch (const std::exception& error) {
      watch_->lose_peer(peer, error.what());
    }
  }
  void move(Channel channel, const at::Tensor& bytes, int peer, bool out, int tag) {
    Moving moving = post(channel, bytes, peer, out, tag);
    finish(moving);
  }
  void finish(Moving& moving) { watch_->finish(*moving.work, moving.peer); }

  const RankSpec spec_;
  std::shared_ptr<Watch> watch_;
  c10::intrusive_ptr<c10d::Store> store_;
  int64_t generation_ = 0;  // of the store's starts
  std::string own_;         // address
  c10::intrusive_ptr<c10d::ProcessGroupGloo> channels_[kChannels];
  std::map<std::vector<int>, std::unique_ptr<RankGroup>> made_;  // by members
  std::map<std::string, int> lines_;                             // made, by ends
  std::mutex grouping_;
  std::mutex posting_[kChannels];
  std::vector<Moving> owed_[kChannels];
  std::atomic<int64_t> sent_{0}, received_{0};
  std::optional<Watchers> watchers_;
};

struct Attempt {
  std::mutex mutex;
  std::condition_variable ended;
  bool over = false;
  std::shared_ptr<Watch> watch = std::make_shared<Watch>();
  std::shared_ptr<Ranks> joined;
  std::exception_ptr error;
  std::string watch_lost() const {
    const std::lock_guard lock(watch->mutex);
    return watch->lost;
  }
};

// Why it is of no use to wait for a joining any longer; empty: it is.
std::string hopeless(const RankSpec& spec, Watch& watch, Clock::time_point deadline) {
  const std::lock_guard lock(watch.mutex);
  if (!watch.lost.empty()) return watch.lost;
  // All are there by then, so that what takes longer than a silence is a fault.
  if (!watch.connecting.empty() && Clock::now() - watch.since > to_ms(spec.silence_seconds + 5))
    return unconnected(spec, watch.connecting) + kCheckNetwork;
  if (Clock::now() <= deadline) return {};
  return "[ranks] the store at " + spec.address + ":" + std::to_string(spec.port) + " does not answer rank " +
         std::to_string(spec.rank) + ". Check that rank 0 runs, and the way to its machine";
}

// The store answers, so that the others may hear why; who serves it gives them the time.
void tell_unconnected(const RankSpec& spec, Watch& watch, const std::string& why) {
  {
    const std::lock_guard lock(watch.mutex);
    if (watch.connecting.empty() || !watch.lost.empty()) return;
  }
  try {
    watch.store->set("last/" + std::to_string(spec.rank), bytes_of(why));
    if (serves(spec)) std::this_thread::sleep_for(4 * kBeat);
  } catch (const std::exception&) {
    // It does not, and that is what they see.
  }
}

}  // namespace

std::shared_ptr<Ranks> Ranks::join(const RankSpec& spec) {
  if (spec.size < 1 || spec.rank < 0 || spec.rank >= spec.size)
    engine::fail("RANKS", "[ranks] expected 0 <= rank < size, got rank ", spec.rank, " of ", spec.size);
  // c10d has waits that nothing here ends: for a store that is frozen, a peer that is gone, packets that are dropped
  // without a word. A thread that is in one of them is left behind.
  const auto attempt = std::make_shared<Attempt>();
  std::thread thread([attempt, spec] {
    std::shared_ptr<Ranks> joined;
    std::exception_ptr error;
    try {
      joined = std::make_shared<Joined>(spec, attempt->watch);
    } catch (...) {
      error = std::current_exception();
    }
    const std::lock_guard lock(attempt->mutex);
    attempt->joined = std::move(joined);
    attempt->error = error;
    attempt->over = true;
    attempt->ended.notify_all();
  });
  // Its own waits have their time; this is for those that have none.
  const auto deadline = Clock::now() + to_ms(spec.join_seconds + spec.silence_seconds);
  auto patience = Clock::time_point::max();
  std::string why;
  std::unique_lock lock(attempt->mutex);
  while (!attempt->ended.wait_for(lock, milliseconds(50), [&] { return attempt->over; })) {
    why = hopeless(spec, *attempt->watch, deadline);
    const bool known = !attempt->watch_lost().empty();
    if ((!why.empty() && !known) || Clock::now() > patience) break;
    // The joining may be about to end by itself: it tells the others why first.
    if ((known || (spec.cancelled && *spec.cancelled)) && patience == Clock::time_point::max())
      patience = Clock::now() + std::chrono::seconds(3);
  }
  const bool over = attempt->over;
  lock.unlock();
  if (!over) {
    tell_unconnected(spec, *attempt->watch, why);
    attempt->watch->lose(why);
    thread.detach();
    unless_cancelled(spec, "while it joined the others");
    engine::fail("RANKS", why);
  }
  thread.join();
  if (attempt->error) std::rethrow_exception(attempt->error);
  return attempt->joined;
}

}  // namespace stroma::engine
