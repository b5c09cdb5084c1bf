#include "engine/ranks.h"

#include <ATen/Functions.h>
#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <set>
#include <thread>

#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>

#include "engine/error.h"
#include "engine/rank_group.h"

namespace stroma::engine {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
constexpr int kChannels = 3;
// A wait ends when its message is there or its peer is lost; Gloo's own clock is not asked.
constexpr milliseconds kForever = std::chrono::hours(24 * 365);
constexpr auto kBeat = std::chrono::milliseconds(500);

milliseconds to_ms(double seconds) { return milliseconds(static_cast<int64_t>(seconds * 1e3)); }

// What Gloo and c10d say, without where in their sources they say it and what else they advise.
std::string first_line(const char* text) {
  std::string all = text;
  all = all.substr(0, all.find('\n'));
  if (all.rfind('[', 0) == 0 && all.find("] ") < 200) all = all.substr(all.find("] ") + 2);
  return all.substr(0, all.find(". This is typically"));
}

std::string host_name() {
  char name[256] = {0};
  gethostname(name, sizeof name - 1);
  return name;
}

// A listening socket on the address alone where it is this machine's own loopback, else on all interfaces.
int listen_at(const std::string& address, int port) {
  const bool local = address == "localhost" || address.rfind("127.", 0) == 0;
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int yes = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  sockaddr_in at{};
  at.sin_family = AF_INET;
  at.sin_port = htons(static_cast<uint16_t>(port));
  at.sin_addr.s_addr = htonl(local ? INADDR_LOOPBACK : INADDR_ANY);
  if (fd < 0 || bind(fd, reinterpret_cast<sockaddr*>(&at), sizeof at) != 0 || listen(fd, 1024) != 0) {
    const std::string why = std::strerror(errno);
    if (fd >= 0) close(fd);
    fail("RANKS", "[ranks] rank 0 cannot listen at ", address, ":", port, ": ", why, ". Give another port");
  }
  return fd;
}

// The address of this machine that the others reach it at: the one that the way to the store leaves from.
std::string own_address(const std::string& address, int port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_DGRAM;
  if (getaddrinfo(address.c_str(), std::to_string(port).c_str(), &hints, &found) != 0 || found == nullptr)
    fail("RANKS", "[ranks] there is no machine named ", address, ". Check MASTER_ADDR");
  std::string own = "127.0.0.1";
  const int fd = socket(found->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  sockaddr_storage at{};
  socklen_t length = sizeof at;
  char text[NI_MAXHOST];
  // Nothing is sent: connecting a datagram socket only chooses a way.
  if (fd >= 0 && connect(fd, found->ai_addr, found->ai_addrlen) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&at), &length) == 0 &&
      getnameinfo(reinterpret_cast<sockaddr*>(&at), length, text, sizeof text, nullptr, 0, NI_NUMERICHOST) == 0)
    own = text;
  if (fd >= 0) close(fd);
  freeaddrinfo(found);
  return own;
}

c10::intrusive_ptr<c10d::Store> connect_store(const RankSpec& spec, bool serve, milliseconds timeout) {
  c10d::TCPStoreOptions options;
  options.port = static_cast<uint16_t>(spec.port);
  options.isServer = serve;
  options.waitWorkers = false;
  options.timeout = timeout;
  options.useLibUV = false;  // libtorch's libuv would bind to Node's
  if (serve) options.masterListenFd = listen_at(spec.address, spec.port);
  try {
    auto store = c10::make_intrusive<c10d::TCPStore>(spec.address, options);
    return c10::make_intrusive<c10d::PrefixStore>(spec.prefix + "stroma", store);
  } catch (const std::exception& error) {
    fail("RANKS", "[ranks] rank ", spec.rank, " found no store at ", spec.address, ":", spec.port, " in ",
         spec.join_seconds, " s: ", first_line(error.what()), ". Check that rank 0 runs and that the port is open");
  }
}

std::vector<uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }
std::string text_of(const std::vector<uint8_t>& bytes) { return {bytes.begin(), bytes.end()}; }

// What the threads that look after the others share with the ranks; outlives both.
struct Watch {
  RankSpec spec;
  c10::intrusive_ptr<c10d::Store> store;
  std::vector<std::string> names;  // "rank 1 (host, process 4711)"
  std::mutex mutex;
  std::condition_variable changed;
  bool over = false;
  bool polling_ended = false;
  std::string lost;  // why; empty while all is well
  Clock::time_point polled = Clock::now();
  std::set<c10d::Work*> waits;

  // Ends every wait. The first reason stays.
  void lose(const std::string& why) {
    const std::lock_guard lock(mutex);
    if (over || !lost.empty()) return;
    lost = why;
    for (c10d::Work* work : waits) work->abort();
    changed.notify_all();
  }

  // Returns when the transfer with `peer` is done; throws RANKS when a rank is lost.
  void finish(c10d::Work& work, int peer) {
    {
      const std::lock_guard lock(mutex);
      if (!lost.empty()) engine::fail("RANKS", lost);
      waits.insert(&work);
    }
    bool done = false;
    std::string why;
    try {
      done = work.wait(kForever);
    } catch (const std::exception& error) {
      why = error.what();
    }
    std::string reason;
    {
      const std::lock_guard lock(mutex);
      waits.erase(&work);
      reason = lost;
    }
    if (!reason.empty()) engine::fail("RANKS", reason);
    if (!done) lose_peer(peer, why.c_str());
  }
  // A broken connection: the peer may have said why before it went.
  [[noreturn]] void lose_peer(int peer, const char* why) {
    {
      std::unique_lock lock(mutex);
      changed.wait_for(lock, 2 * kBeat, [&] { return !lost.empty(); });
    }
    lose("[ranks] " + names.at(peer) + " is gone: " + first_line(why));
    const std::lock_guard lock(mutex);
    engine::fail("RANKS", lost);
  }
};

// Beats, and listens for the others' beats and last words.
void poll(const std::shared_ptr<Watch>& watch) {
  const int size = watch->spec.size, self = watch->spec.rank;
  std::vector<std::string> keys;
  for (int r = 0; r < size; ++r) keys.push_back("beat/" + std::to_string(r));
  for (int r = 0; r < size; ++r) keys.push_back("last/" + std::to_string(r));
  std::vector<std::string> seen(size);
  std::vector<Clock::time_point> when(size, Clock::now());
  int64_t beats = 0;
  std::unique_lock lock(watch->mutex);
  while (!watch->over && watch->lost.empty()) {
    lock.unlock();
    try {
      watch->store->set(keys[self], bytes_of(std::to_string(++beats)));
      const auto values = watch->store->multiGet(keys);
      const auto now = Clock::now();
      for (int r = 0; r < size; ++r) {
        const std::string beat = text_of(values[r]), last = text_of(values[size + r]);
        if (beat != seen[r]) {
          seen[r] = beat;
          when[r] = now;
        }
        if (r == self || last == "left") continue;
        if (!last.empty()) watch->lose("[ranks] " + watch->names[r] + " failed: " + last);
        if (now - when[r] > to_ms(watch->spec.silence_seconds))
          watch->lose("[ranks] " + watch->names[r] + " has been silent for " +
                      std::to_string(static_cast<int64_t>(watch->spec.silence_seconds)) + " s");
      }
    } catch (const std::exception&) {
      // The judge counts how long the store has not answered; a store that is gone never will.
      std::this_thread::sleep_for(kBeat);
      lock.lock();
      continue;
    }
    lock.lock();
    watch->polled = Clock::now();
    watch->changed.wait_for(lock, kBeat, [&] { return watch->over || !watch->lost.empty(); });
  }
  watch->polling_ended = true;
  watch->changed.notify_all();
}

// A poll may hang in a store whose process is frozen: somebody else must notice.
void judge(const std::shared_ptr<Watch>& watch) {
  std::unique_lock lock(watch->mutex);
  while (!watch->over && watch->lost.empty()) {
    watch->changed.wait_for(lock, kBeat);
    if (watch->over || Clock::now() - watch->polled <= to_ms(watch->spec.silence_seconds)) continue;
    lock.unlock();
    watch->lose("[ranks] the store at " + watch->spec.address + ":" + std::to_string(watch->spec.port) +
                " has not answered for " + std::to_string(static_cast<int64_t>(watch->spec.silence_seconds)) +
                " s: the process that serves it (rank 0 or the launcher) is gone or frozen");
    lock.lock();
  }
}

class Joined final : public Ranks {
  struct Moving {
    c10::intrusive_ptr<c10d::Work> work;
    at::Tensor bytes;
    int peer;
  };

 public:
  explicit Joined(const RankSpec& spec)
      : spec_(spec), own_(own_address(spec.address, spec.port)), watch_(std::make_shared<Watch>()) {
    const auto deadline = Clock::now() + to_ms(spec.join_seconds);
    store_ = connect_store(spec, spec.serve && spec.rank == 0, to_ms(spec.join_seconds));
    store_->set("beat/" + std::to_string(spec.rank), bytes_of("0"));
    store_->set("last/" + std::to_string(spec.rank), bytes_of(""));
    store_->set(here(spec.rank), bytes_of(host_name() + ", process " + std::to_string(getpid())));
    for (int r = 0; r < spec.size; ++r) {
      while (!store_->check({here(r)})) {
        if (Clock::now() > deadline)
          engine::fail("RANKS", "[ranks] rank ", spec.rank, " waited ", spec.join_seconds, " s for rank ", r, " at ",
                       spec.address, ":", spec.port, ". Check that all ", spec.size, " ranks were started");
        std::this_thread::sleep_for(milliseconds(20));
      }
      watch_->names.push_back("rank " + std::to_string(r) + " (" + text_of(store_->get(here(r))) + ")");
    }
    try {
      for (int c = 0; c < kChannels; ++c) channels_[c] = gloo("channel" + std::to_string(c), spec.rank, spec.size);
    } catch (const std::exception& error) {
      engine::fail("RANKS", "[ranks] rank ", spec.rank, " at ", own_,
                   " could not connect to all others: ", first_line(error.what()),
                   ". Check that the ranks' machines reach each other");
    }
    watch_->spec = spec;
    watch_->store = connect_store(spec, false, to_ms(spec.silence_seconds));
    watch_->polled = Clock::now();
    poll_ = std::thread([watch = watch_] { poll(watch); });
    judge_ = std::thread([watch = watch_] { judge(watch); });
  }

  ~Joined() override {
    {
      std::unique_lock lock(watch_->mutex);
      watch_->over = true;
      watch_->changed.notify_all();
      // A poll that hangs in a frozen store is left behind; it holds nothing but the watch.
      watch_->changed.wait_for(lock, std::chrono::seconds(2), [&] { return watch_->polling_ended; });
      if (!watch_->polling_ended) poll_.detach();
    }
    if (poll_.joinable()) poll_.join();
    judge_.join();
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
      const auto channel =
          gloo("group/" + list, static_cast<int>(place - members.begin()), static_cast<int>(members.size()));
      auto made = std::make_unique<RankGroup>(
          store_, channel, members, [watch = watch_](c10d::Work& work, int rank) { watch->finish(work, rank); },
          [watch = watch_](int rank, const char* why) { watch->lose_peer(rank, why); });
      return made_.emplace(members, std::move(made)).first->second->name();
    } catch (const std::exception& error) {
      if (const std::string why = lost(); !why.empty()) engine::fail("RANKS", why);
      engine::fail("RANKS", "[ranks] rank ", spec_.rank, " at ", own_, " could not connect to the group of ranks ",
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

  void meet(int peer, bool sends) override { move(Channel::kData, at::zeros({1}, at::kByte), peer, /*out=*/!sends, 3); }
  c10::intrusive_ptr<c10d::Store> line_store(int from, int to) override {
    const std::string line = std::to_string(from) + "/" + std::to_string(to);
    int made = 0;
    {
      const std::lock_guard lock(grouping_);
      made = lines_[line]++;
    }
    return c10::make_intrusive<c10d::PrefixStore>("line/" + line + "/" + std::to_string(made),
                                                  connect_store(spec_, false, to_ms(spec_.silence_seconds)));
  }
  void moved(int64_t sent, int64_t received) override {
    sent_ += sent;
    received_ += received;
  }
  void lose(int peer, const std::string& why) override { watch_->lose_peer(peer, why.c_str()); }

  void fail(const std::string& why) override {
    try {
      store_->set("last/" + std::to_string(spec_.rank), bytes_of(why.empty() ? "no reason given" : why));
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
    {
      const std::lock_guard lock(watch_->mutex);
      if (watch_->over) return;
      watch_->over = true;
      watch_->changed.notify_all();
      // After fail() its reason is the last word.
      if (!watch_->lost.empty()) return;
    }
    try {
      store_->set("last/" + std::to_string(spec_.rank), bytes_of("left"));
      // Whoever serves the store leaves last, or the others would miss it.
      if (spec_.serve && spec_.rank == 0) {
        const auto deadline = Clock::now() + to_ms(std::min(10.0, spec_.silence_seconds));
        for (int r = 1; r < spec_.size; ++r)
          while (text_of(store_->get("last/" + std::to_string(r))).empty() && Clock::now() < deadline)
            std::this_thread::sleep_for(milliseconds(20));
      }
    } catch (const std::exception&) {
    }
  }

  int64_t sent_bytes() const override { return sent_; }
  int64_t received_bytes() const override { return received_; }

 private:
  static std::string here(int rank) { return "here/" + std::to_string(rank); }
  const std::string& name(int peer) const { return watch_->names.at(peer); }

  c10::intrusive_ptr<c10d::ProcessGroupGloo> gloo(const std::string& prefix, int rank, int size) const {
    auto options = c10d::ProcessGroupGloo::Options::create(to_ms(spec_.join_seconds));
    options->threads = 1;
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(own_));
    return c10::make_intrusive<c10d::ProcessGroupGloo>(c10::make_intrusive<c10d::PrefixStore>(prefix, store_), rank,
                                                       size, std::move(options));
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
  const std::string own_;  // address
  std::shared_ptr<Watch> watch_;
  c10::intrusive_ptr<c10d::Store> store_;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> channels_[kChannels];
  std::map<std::vector<int>, std::unique_ptr<RankGroup>> made_;  // by members
  std::map<std::string, int> lines_;                             // made, by ends
  std::mutex grouping_;
  std::mutex posting_[kChannels];
  std::vector<Moving> owed_[kChannels];
  std::atomic<int64_t> sent_{0}, received_{0};
  std::thread poll_, judge_;
};

}  // namespace

std::shared_ptr<Ranks> Ranks::join(const RankSpec& spec) {
  if (spec.size < 1 || spec.rank < 0 || spec.rank >= spec.size)
    engine::fail("RANKS", "[ranks] expected 0 <= rank < size, got rank ", spec.rank, " of ", spec.size);
  return std::make_shared<Joined>(spec);
}

}  // namespace stroma::engine
