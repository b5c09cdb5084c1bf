#include "binding/lane.h"

#include <mutex>
#include <set>

namespace stroma {
namespace {

ErrorInfo describe(const std::exception_ptr& error) {
  try {
    std::rethrow_exception(error);
  } catch (const engine::Error& e) {
    return {e.code, e.what(), {}};
  } catch (...) {
    return translate(std::current_exception());
  }
}

struct LiveLanes {
  std::mutex mutex;
  std::set<Lane*> lanes;
};
LiveLanes& live_lanes() {
  static auto* live = new LiveLanes;
  return *live;
}

}  // namespace

struct Lane::Job {
  Napi::Promise::Deferred deferred;
  Napi::ObjectReference owner;  // not garbage while its promise is pending
  std::function<Finish()> work;
  Finish finish;
  std::optional<ErrorInfo> error;
  std::shared_ptr<Lane> lane;  // while the result is on its way
};

Lane::Lane(Napi::Env env, const char* name, std::function<void()> on_start, std::function<void()> on_stop)
    : env_(env), on_stop_(std::move(on_stop)), worker_(std::move(on_start)) {
  deliver_ = Napi::ThreadSafeFunction::New(env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), name, 0, 1);
  deliver_.Unref(env);
  napi_add_env_cleanup_hook(env, &Lane::on_cleanup, this);
  const std::lock_guard lock(live_lanes().mutex);
  live_lanes().lanes.insert(this);
}

Napi::Value Lane::post(const Napi::CallbackInfo& info, std::function<Finish()> work) {
  const Napi::Env env = info.Env();
  auto* job = new Job{
      Napi::Promise::Deferred::New(env), Napi::Persistent(info.This().As<Napi::Object>()), std::move(work), {}, {}, {}};
  const Napi::Promise promise = job->deferred.Promise();
  if (pending_++ == 0) deliver_.Ref(env);
  worker_.post([this, job, self = shared_from_this()]() mutable {
    try {
      job->finish = job->work();
    } catch (...) {
      job->error = describe(std::current_exception());
    }
    job->work = nullptr;
    // The lane lives until its last result has been told, also when its session is garbage by then; and the last to let
    // go of it is JavaScript's thread, since this one cannot wait for its own end.
    job->lane = std::move(self);
    deliver_.NonBlockingCall(job, [](Napi::Env on, Napi::Function, Job* done) {
      const std::shared_ptr<Lane> lane = std::move(done->lane);
      lane->settle(on, done);
    });
  });
  return promise;
}

void Lane::stop() {
  if (stopped_) return;
  stopped_ = true;
  end_thread();
  {
    const std::lock_guard lock(live_lanes().mutex);
    live_lanes().lanes.erase(this);
  }
  napi_remove_env_cleanup_hook(env_, &Lane::on_cleanup, this);
  deliver_.Release();
}

void Lane::end_thread() {
  if (on_stop_) on_stop_();
  worker_.stop();
}

void Lane::retire() {
  retiring_ = true;
  if (pending_ == 0) stop();
}

void Lane::settle(Napi::Env env, Job* job) {
  // The environment is going: its references can no longer be let go, and the process ends anyway.
  if (env == nullptr || stopped_) return;
  const std::unique_ptr<Job> owned(job);
  const Napi::HandleScope scope(env);
  --pending_;
  if (pending_ == 0 && !stopped_) {
    deliver_.Unref(env);
    if (retiring_) stop();
  }
  try {
    if (job->error.has_value())
      job->deferred.Reject(make_error(env, *job->error));
    else
      job->deferred.Resolve(job->finish ? job->finish(env) : env.Undefined());
  } catch (const Napi::Error& error) {
    job->deferred.Reject(error.Value());
  } catch (...) {
    job->deferred.Reject(make_error(env, describe(std::current_exception())));
  }
}

void end_all_lanes() {
  const std::lock_guard lock(live_lanes().mutex);
  for (Lane* lane : live_lanes().lanes) lane->end_thread();
}

}  // namespace stroma
