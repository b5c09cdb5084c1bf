// A thread beside JavaScript's, and the way back from it: every task gives a promise.
#pragma once
#include <napi.h>

#include <functional>
#include <memory>
#include <optional>

#include "binding/errors.h"
#include "engine/error.h"
#include "engine/worker.h"

namespace stroma {

using Finish = std::function<Napi::Value(Napi::Env)>;

// Runs f on JavaScript's thread; the engine's errors become StromaErrors.
template <class F>
Napi::Value entry(const Napi::CallbackInfo& info, F&& f) {
  return guarded(info, [&]() -> Napi::Value {
    try {
      return f();
    } catch (const engine::Error& e) {
      throw CodedError(e.code, e.what());
    }
  });
}

// Tasks are counted so that the process stays alive exactly while one is under way.
//
// The environment's cleanup hooks run last added first, and the thread-safe function has one: this lane's hook is added
// after it, so that the thread has ended and let go of the function before that is torn down.
class Lane : public std::enable_shared_from_this<Lane> {
 public:
  // on_stop: asks the task in flight to end early.
  Lane(Napi::Env env, const char* name, std::function<void()> on_start, std::function<void()> on_stop = {});
  ~Lane() { stop(); }

  Napi::Value post(const Napi::CallbackInfo& info, std::function<Finish()> work);
  size_t queued() const { return worker_.queued(); }
  // Waits for the task in flight, drops the rest. JavaScript's thread only.
  void stop();
  void end_thread();
  // Stops as soon as nothing is pending.
  void retire();

 private:
  struct Job;
  static void on_cleanup(void* lane) { static_cast<Lane*>(lane)->stop(); }
  void settle(Napi::Env env, Job* job);

  napi_env env_;
  std::function<void()> on_stop_;
  Napi::ThreadSafeFunction deliver_;
  engine::Worker worker_;
  size_t pending_ = 0;  // touched on JavaScript's thread only, as are the flags
  bool stopped_ = false, retiring_ = false;
};

// process.exit() runs no cleanup hooks: the loader calls this on it, before static objects go.
void end_all_lanes();

}  // namespace stroma
