#include "engine/ranks_watch.h"

#include <algorithm>

#include "engine/error.h"

namespace stroma::engine {

std::string first_line(const char* text) {
  std::string all = text;
  all = all.substr(0, all.find('\n'));
  if (all.rfind('[', 0) == 0 && all.find("] ") < 200) all = all.substr(all.find("] ") + 2);
  return all.substr(0, all.find(". This is typically"));
}

std::vector<uint8_t> bytes_of(const std::string& text) { return {text.begin(), text.end()}; }
std::string text_of(const std::vector<uint8_t>& bytes) { return {bytes.begin(), bytes.end()}; }

void Watch::lose(const std::string& why, int whose) {
  const std::lock_guard lock(mutex);
  if (whose >= 0) gone.insert(whose);
  if (over || !lost.empty()) return;
  lost = why;
  for (c10d::Work* work : waits) work->abort();
  changed.notify_all();
}

void Watch::finish(c10d::Work& work, int peer) {
  // A wait ends when its message is there or its peer is lost; Gloo's own clock is not asked.
  constexpr milliseconds kForever = std::chrono::hours(24 * 365);
  {
    const std::lock_guard lock(mutex);
    if (!lost.empty()) fail("RANKS", lost);
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
  if (!reason.empty()) fail("RANKS", reason);
  if (!done) lose_peer(peer, why.c_str());
}

void Watch::lose_peer(int peer, const char* why) {
  {
    std::unique_lock lock(mutex);
    changed.wait_for(lock, 2 * kBeat, [&] { return !lost.empty(); });
  }
  lose("[ranks] " + names.at(peer) + " is gone: " + first_line(why), peer);
  const std::lock_guard lock(mutex);
  fail("RANKS", lost);
}

void Watch::set_connecting(const std::string& by) {
  const std::lock_guard lock(mutex);
  connecting = by;
  since = Clock::now();
}

milliseconds Watch::lived() {
  // Two threads ask at every beat: where neither came for longer, nothing of this process ran.
  const auto now = Clock::now();
  lived_ += std::min(std::chrono::duration_cast<milliseconds>(now - ticked_), kBeat);
  ticked_ = now;
  return lived_;
}

namespace {

std::string seconds_of(const Watch& watch) {
  return std::to_string(static_cast<int64_t>(watch.spec.silence_seconds)) + " s";
}

// Who serves the store, for a sentence that goes on.
std::string store_of(const Watch& watch) {
  const std::string at = "the store at " + watch.spec.address + ":" + std::to_string(watch.spec.port);
  return watch.spec.serve ? watch.names[0] + ", which serves " + at + "," : at + ", which the launcher serves,";
}
int server_of(const Watch& watch) { return watch.spec.serve ? 0 : -1; }

void poll(const std::shared_ptr<Watch>& watch) {
  const int size = watch->spec.size, self = watch->spec.rank;
  std::vector<std::string> keys;
  for (int r = 0; r < size; ++r) keys.push_back("beat/" + std::to_string(r));
  for (int r = 0; r < size; ++r) keys.push_back("last/" + std::to_string(r));
  std::vector<std::string> seen(size);
  std::unique_lock lock(watch->mutex);
  std::vector<milliseconds> when(size, watch->lived());
  int64_t beats = 0;
  while (!watch->over && watch->lost.empty()) {
    lock.unlock();
    std::vector<std::vector<uint8_t>> values;
    std::string broken;
    try {
      watch->store->set(keys[self], bytes_of(std::to_string(++beats)));
      values = watch->store->multiGet(keys);
    } catch (const std::exception& error) {
      broken = first_line(error.what());
    }
    lock.lock();
    const milliseconds now = watch->lived();
    if (broken.empty()) watch->answered = now;
    lock.unlock();
    if (!broken.empty()) {
      // Who serves it has ended; a connection that broke for another reason is not mended either.
      watch->lose("[ranks] " + store_of(*watch) + " is gone: " + broken, server_of(*watch));
    } else {
      for (int r = 0; r < size; ++r) {
        const std::string beat = text_of(values[r]), last = text_of(values[size + r]);
        if (beat != seen[r]) {
          seen[r] = beat;
          when[r] = now;
        }
        if (r == self || last == "left") continue;
        if (!last.empty()) watch->lose("[ranks] " + watch->names[r] + " failed: " + last, r);
        if (now - when[r] > to_ms(watch->spec.silence_seconds))
          watch->lose("[ranks] " + watch->names[r] + " has been silent for " + seconds_of(*watch), r);
      }
    }
    lock.lock();
    watch->changed.wait_for(lock, kBeat, [&] { return watch->over || !watch->lost.empty(); });
  }
  watch->polling_ended = true;
  watch->changed.notify_all();
}

// A poll may hang in a store whose process is frozen, or beyond a link that is cut: somebody else must notice.
void judge(const std::shared_ptr<Watch>& watch) {
  std::unique_lock lock(watch->mutex);
  while (!watch->over && watch->lost.empty()) {
    watch->changed.wait_for(lock, kBeat);
    if (watch->over || watch->lived() - watch->answered <= to_ms(watch->spec.silence_seconds)) continue;
    lock.unlock();
    watch->lose("[ranks] " + store_of(*watch) + " has not answered for " + seconds_of(*watch) +
                    ": it is gone or frozen, or the way there is cut",
                server_of(*watch));
    lock.lock();
  }
}

}  // namespace

Watchers::Watchers(std::shared_ptr<Watch> watch) : watch_(std::move(watch)) {
  {
    const std::lock_guard lock(watch_->mutex);
    watch_->answered = watch_->lived();
  }
  poll_ = std::thread([watch = watch_] { poll(watch); });
  judge_ = std::thread([watch = watch_] { judge(watch); });
}

Watchers::~Watchers() {
  {
    std::unique_lock lock(watch_->mutex);
    watch_->over = true;
    watch_->changed.notify_all();
    watch_->changed.wait_for(lock, std::chrono::seconds(2), [&] { return watch_->polling_ended; });
    if (!watch_->polling_ended) poll_.detach();
  }
  if (poll_.joinable()) poll_.join();
  judge_.join();
}

}  // namespace stroma::engine
