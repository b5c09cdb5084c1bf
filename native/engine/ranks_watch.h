// The threads that look after the other ranks of a run: one beats in the store and listens for the others' beats and
// last words, one notices when the store itself does not answer. Whoever finds somebody lost ends every wait of this
// rank.
#pragma once
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "engine/ranks.h"

namespace stroma::engine {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kBeat{500};

inline milliseconds to_ms(double seconds) { return milliseconds(static_cast<int64_t>(seconds * 1e3)); }

// What Gloo and c10d say, without where in their sources they say it and what else they advise.
std::string first_line(const char* text);

std::vector<uint8_t> bytes_of(const std::string& text);
std::string text_of(const std::vector<uint8_t>& bytes);

// What the threads share with the ranks; outlives both.
struct Watch {
  RankSpec spec;
  c10::intrusive_ptr<c10d::Store> store;
  std::vector<std::string> names;  // "rank 1 (host, process 4711)"
  std::mutex mutex;
  std::condition_variable changed;
  bool over = false;
  bool polling_ended = false;
  std::string lost;    // why; empty while all is well
  std::set<int> gone;  // ranks from which no last word will come
  std::set<c10d::Work*> waits;
  std::string connecting;   // by which address channels to the others are made; empty before and after
  Clock::time_point since;  // when that began

  // Ends every wait. The first reason stays. `whose`: the rank that is gone, where it is one.
  void lose(const std::string& why, int whose = -1);

  // Returns when the transfer with `peer` is done; throws RANKS when a rank is lost.
  void finish(c10d::Work& work, int peer);
  // A broken connection: the peer may have said why before it went.
  [[noreturn]] void lose_peer(int peer, const char* why);

  void set_connecting(const std::string& by);

  // Time that this process has had, on the mutex: while it is stopped (Ctrl-Z, a debugger, a machine that is moved)
  // nobody else is silent, it is deaf.
  milliseconds lived();
  milliseconds answered{0};  // when the store last did

 private:
  Clock::time_point ticked_ = Clock::now();
  milliseconds lived_{0};
};

// The two threads. Ended by the destructor, which leaves one that hangs in a frozen store behind; it holds the watch
// alone.
class Watchers {
 public:
  explicit Watchers(std::shared_ptr<Watch> watch);
  ~Watchers();

 private:
  std::shared_ptr<Watch> watch_;
  std::thread poll_, judge_;
};

}  // namespace stroma::engine
