// joinRanks(spec, signal?) -> Promise<NativeRanks>: what processes of one run say to each other outside of steps. No
// arithmetic.
#include "binding/ranks.h"

#include "binding/env_state.h"
#include "binding/exports.h"
#include "binding/lane.h"
#include "binding/session_decode.h"
#include "engine/nccl_links.h"

namespace stroma {
namespace {

class RanksWrap : public Napi::ObjectWrap<RanksWrap> {
 public:
  struct Made {
    std::shared_ptr<engine::Ranks> ranks;
    std::shared_ptr<Lane> lane;
  };
  static constexpr napi_type_tag kTag = {0x6f2d7f1f0f6a4be1, 0x9bd5c6b6a3a14c11};

  static Napi::Function define(Napi::Env env) {
    using R = RanksWrap;
    return DefineClass(
        env, "NativeRanks",
        {InstanceMethod<&R::gather>("gather"), InstanceMethod<&R::group>("group"), InstanceMethod<&R::fail>("fail"),
         InstanceMethod<&R::lost>("lost"), InstanceMethod<&R::leave>("leave"), InstanceMethod<&R::counts>("counts")});
  }
  explicit RanksWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<RanksWrap>(info) {
    if (info.Length() != 1 || !info[0].IsExternal()) {
      Napi::TypeError::New(info.Env(), "[ranks] use joinRanks()").ThrowAsJavaScriptException();
      return;
    }
    made_ = *info[0].As<Napi::External<Made>>().Data();
    info.This().As<Napi::Object>().TypeTag(&kTag);
    info.This().As<Napi::Object>().Set("rank", made_.ranks->spec().rank);
    info.This().As<Napi::Object>().Set("size", made_.ranks->spec().size);
  }
  std::shared_ptr<engine::Ranks> use() const {
    if (!made_.ranks) throw CodedError("DISPOSED", "[ranks] this rank has left");
    return made_.ranks;
  }

 private:
  static std::string text(const Napi::CallbackInfo& info) {
    if (info.Length() < 1 || !info[0].IsString()) throw CodedError("INVALID_ARGUMENT", "[ranks] expected a string");
    return info[0].As<Napi::String>().Utf8Value();
  }
  Napi::Value gather(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      return made_.lane->post(info, [ranks = use(), mine = text(info)]() -> Finish {
        auto all = ranks->gather(engine::Ranks::Channel::kHost, mine);
        return [all](Napi::Env env) -> Napi::Value {
          Napi::Array result = Napi::Array::New(env, all.size());
          for (uint32_t r = 0; r < all.size(); ++r) result.Set(r, all[r]);
          return result;
        };
      });
    });
  }
  Napi::Value group(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      if (info.Length() < 1 || !info[0].IsArray())
        throw CodedError("INVALID_ARGUMENT", "[ranks] expected an array of ranks");
      const Napi::Array list = info[0].As<Napi::Array>();
      std::vector<int> members;
      for (uint32_t i = 0; i < list.Length(); ++i) {
        const Napi::Value member = list.Get(i);
        if (!member.IsNumber()) throw CodedError("INVALID_ARGUMENT", "[ranks] expected an array of ranks");
        members.push_back(member.As<Napi::Number>().Int32Value());
      }
      return made_.lane->post(info, [ranks = use(), members]() -> Finish {
        const std::string name = ranks->group(members);
        return [name](Napi::Env env) -> Napi::Value { return Napi::String::New(env, name); };
      });
    });
  }
  Napi::Value fail(const Napi::CallbackInfo& info) {
    return entry(info, [&]() -> Napi::Value {
      use()->fail(text(info));
      return info.Env().Undefined();
    });
  }
  Napi::Value lost(const Napi::CallbackInfo& info) {
    return entry(info, [&]() -> Napi::Value {
      const std::string why = use()->lost();
      if (why.empty()) return info.Env().Null();
      return Napi::String::New(info.Env(), why);
    });
  }
  Napi::Value leave(const Napi::CallbackInfo& info) {
    return entry(info, [&]() -> Napi::Value {
      if (!made_.ranks) return info.Env().Undefined();
      auto ranks = std::move(made_.ranks);
      made_.ranks.reset();
      const Napi::Value done = made_.lane->post(info, [ranks = std::move(ranks)]() mutable -> Finish {
        ranks->leave();
        ranks.reset();
        return {};
      });
      made_.lane->retire();
      return done;
    });
  }
  Napi::Value counts(const Napi::CallbackInfo& info) {
    return entry(info, [&]() -> Napi::Value {
      Napi::Object result = Napi::Object::New(info.Env());
      result.Set("sentBytes", static_cast<double>(use()->sent_bytes()));
      result.Set("receivedBytes", static_cast<double>(use()->received_bytes()));
      return result;
    });
  }

  Made made_;
};

engine::RankSpec decode_spec(const Napi::Value& value) {
  const Fields fields(value, "ranks");
  engine::RankSpec spec;
  spec.rank = static_cast<int>(fields.integer("rank"));
  spec.size = static_cast<int>(fields.integer("size"));
  spec.address = fields.text("address");
  const int64_t port = fields.integer("port");
  if (port < 1 || port > 65535) throw CodedError("INVALID_ARGUMENT", "[ranks] expected a port from 1 to 65535");
  spec.port = static_cast<int>(port);
  spec.serve = fields.flag("serve");
  spec.prefix = fields.text("prefix");
  spec.join_seconds = fields.number("joinSeconds");
  spec.silence_seconds = fields.number("silenceSeconds");
  if (!(spec.join_seconds > 0) || !(spec.silence_seconds >= 1))
    throw CodedError("INVALID_ARGUMENT", "[ranks] expected joinSeconds above 0 and silenceSeconds of at least 1");
  return spec;
}

// When an AbortSignal is, or is already, aborted.
void cancel_on(const Napi::Object& signal, const std::function<void()>& cancel) {
  if (signal.Get("aborted").ToBoolean()) return cancel();
  const auto listener = Napi::Function::New(signal.Env(), [cancel](const Napi::CallbackInfo&) { cancel(); });
  signal.Get("addEventListener")
      .As<Napi::Function>()
      .Call(signal, {Napi::String::New(signal.Env(), "abort"), listener});
}

}  // namespace

std::shared_ptr<engine::Ranks> ranks_of(const Napi::Value& value) {
  if (!value.IsObject() || !value.As<Napi::Object>().CheckTypeTag(&RanksWrap::kTag))
    throw CodedError("INVALID_ARGUMENT", "[session] expected options.ranks from joinRanks()");
  return RanksWrap::Unwrap(value.As<Napi::Object>())->use();
}

void export_ranks(Napi::Env env, Napi::Object exports) {
  auto made = std::make_shared<Napi::FunctionReference>(Napi::Persistent(RanksWrap::define(env)));
  env_state(env).ranks = made;
  exports.Set("ncclVersion", Napi::Function::New(env, [](const Napi::CallbackInfo& info) -> Napi::Value {
                return entry(info, [&]() -> Napi::Value {
                  const std::string version = engine::nccl::version();
                  if (version.empty()) return info.Env().Null();
                  return Napi::String::New(info.Env(), version);
                });
              }));
  exports.Set("joinRanks", Napi::Function::New(env, [](const Napi::CallbackInfo& info) -> Napi::Value {
                return entry(info, [&]() -> Napi::Value {
                  engine::RankSpec spec = decode_spec(info.Length() > 0 ? info[0] : info.Env().Undefined());
                  spec.cancelled = std::make_shared<std::atomic<bool>>(false);
                  const auto cancel = [cancelled = spec.cancelled] { *cancelled = true; };
                  if (info.Length() > 1 && info[1].IsObject()) cancel_on(info[1].As<Napi::Object>(), cancel);
                  auto lane = std::make_shared<Lane>(info.Env(), "stroma ranks", [] {}, cancel);
                  return lane->post(info, [spec, lane]() -> Finish {
                    auto ranks = engine::Ranks::join(spec);
                    return [ranks, lane](Napi::Env on) -> Napi::Value {
                      RanksWrap::Made made{ranks, lane};
                      auto& type = *std::static_pointer_cast<Napi::FunctionReference>(env_state(on).ranks);
                      return type.New({Napi::External<RanksWrap::Made>::New(on, &made)});
                    };
                  });
                });
              }));
}

}  // namespace stroma
