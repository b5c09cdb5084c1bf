// The session at the crossing: every method posts one task to the engine's thread and gives a promise. No arithmetic.
#include <ATen/Parallel.h>
#include <c10/core/AutogradState.h>
#include <torch/csrc/autograd/grad_mode.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>

#include "binding/env_state.h"
#include "binding/errors.h"
#include "binding/exports.h"
#include "binding/host_tensor.h"
#include "binding/lane.h"
#include "binding/ranks.h"
#include "binding/session_decode.h"
#include "engine/cuda_device.h"
#include "engine/error.h"
#include "engine/host_allocator.h"
#include "engine/worker.h"

namespace stroma {
namespace {

// More tasks than this in flight and the caller is told to wait: a step's batches are memory.
constexpr size_t kMostQueued = 8;

class SessionWrap;
class SnapshotWrap;

struct Door {
  Napi::FunctionReference session, snapshot;
};

Door& door(Napi::Env env) { return *std::static_pointer_cast<Door>(env_state(env).sessions); }

class SnapshotWrap : public Napi::ObjectWrap<SnapshotWrap> {
 public:
  static Napi::Function define(Napi::Env env) {
    return DefineClass(
        env, "NativeSnapshot",
        {InstanceMethod<&SnapshotWrap::write>("write"), InstanceMethod<&SnapshotWrap::write_parts>("writeParts"),
         InstanceMethod<&SnapshotWrap::dispose>("dispose")});
  }
  explicit SnapshotWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SnapshotWrap>(info) {
    if (info.Length() == 1 && info[0].IsExternal()) {
      const Made& made = *info[0].As<Napi::External<Made>>().Data();
      data_ = made.data;
      check_ = made.check;
      // What is no copy is written by the session's own thread, between its steps.
      if (!data_->copied()) lane_ = made.lane;
      info.This().As<Napi::Object>().Set("copied", data_->copied());
    }
    owns_lane_ = !lane_;
    if (owns_lane_) lane_ = std::make_shared<Lane>(info.Env(), "stroma snapshot", [] { at::set_num_threads(1); });
  }
  struct Made {
    std::shared_ptr<engine::Snapshot> data;
    std::shared_ptr<Lane> lane;
    std::function<void()> check;  // throws when the session is gone
  };

 private:
  // What is written, and how what it returns looks in JavaScript.
  template <typename Work>
  Napi::Value writing(const Napi::CallbackInfo& info, Work work) {
    return entry(info, [&]() -> Napi::Value {
      if (!data_) throw CodedError("DISPOSED", "[snapshot] this snapshot was disposed");
      if (info.Length() < 3 || !info[0].IsString())
        throw CodedError("INVALID_ARGUMENT", "[snapshot] expected (path, header, entries)");
      const auto [bytes, size] = view_bytes(info[1], "header");
      return lane_->post(
          info, [data = data_, check = check_, work, path = info[0].As<Napi::String>().Utf8Value(),
                 header = std::string(static_cast<const char*>(bytes), size), entries = decode_entries(info[2])] {
            if (!data->copied() && check) check();
            return work(*data, path, header, entries);
          });
    });
  }
  using Entries = std::vector<engine::FileEntry>;
  Napi::Value write(const Napi::CallbackInfo& info) {
    return writing(info,
                   [](const engine::Snapshot& data, const std::string& path, const std::string& header,
                      const Entries& entries) -> Finish {
                     const auto written = data.write(path, header, entries);
                     return [written](Napi::Env env) -> Napi::Value {
                       Napi::Object result = Napi::Object::New(env);
                       result.Set("bytes", static_cast<double>(written.bytes));
                       result.Set("sha256", written.sha256);
                       return result;
                     };
                   });
  }
  Napi::Value write_parts(const Napi::CallbackInfo& info) {
    return writing(info,
                   [](const engine::Snapshot& data, const std::string& path, const std::string& header,
                      const Entries& entries) -> Finish {
                     const int64_t written = data.write_parts(path, header, entries);
                     return [written](Napi::Env env) -> Napi::Value {
                       return Napi::Number::New(env, static_cast<double>(written));
                     };
                   });
  }
  Napi::Value dispose(const Napi::CallbackInfo& info) {
    data_.reset();
    if (owns_lane_) lane_->retire();
    return info.Env().Undefined();
  }

  std::shared_ptr<engine::Snapshot> data_;
  std::function<void()> check_;
  bool owns_lane_ = true;
  std::shared_ptr<Lane> lane_;
};

class SessionWrap : public Napi::ObjectWrap<SessionWrap> {
 public:
  static Napi::Function define(Napi::Env env) {
    using S = SessionWrap;
    return DefineClass(
        env, "NativeSession",
        {InstanceMethod<&S::load>("load"), InstanceMethod<&S::attach>("attach"),
         InstanceMethod<&S::initialize>("initialize"), InstanceMethod<&S::step>("step"), InstanceMethod<&S::run>("run"),
         InstanceMethod<&S::flush>("flush"), InstanceMethod<&S::gradient>("gradient"), InstanceMethod<&S::read>("read"),
         InstanceMethod<&S::write>("write"), InstanceMethod<&S::state>("state"),
         InstanceMethod<&S::optimizer_step>("optimizerStep"),
         InstanceMethod<&S::set_optimizer_step>("setOptimizerStep"), InstanceMethod<&S::snapshot>("snapshot"),
         InstanceMethod<&S::read_file>("readFile"), InstanceMethod<&S::cancel>("cancel"),
         InstanceMethod<&S::dispose>("dispose"), InstanceMethod<&S::stats>("stats")});
  }

  // The class is reachable from JavaScript through any instance: its constructor answers for itself.
  explicit SessionWrap(const Napi::CallbackInfo& info) : Napi::ObjectWrap<SessionWrap>(info) {
    entry(info, [&]() -> Napi::Value {
      construct(info);
      return info.Env().Undefined();
    });
  }
  ~SessionWrap() override { close(); }

  // Ends the thread; waits for the instruction in flight.
  void close() {
    if (!core_) return;
    if (lane_) lane_->stop();
    core_.reset();
  }

 private:
  // What tasks hold on to; outlives this object while one runs.
  struct Core {
    std::unique_ptr<engine::Executor> executor;
    std::atomic<bool> cancelled{false}, disposed{false};
    std::atomic<int64_t> state_bytes{0};
    engine::Executor& use() {
      if (disposed || !executor) engine::fail("DISPOSED", "[session] this session was disposed");
      return *executor;
    }
  };

  void construct(const Napi::CallbackInfo& info) {
    const Fields options(info.Length() > 0 ? info[0] : info.Env().Undefined(), "options");
    engine::SessionSpec spec;
    const std::string device = options.text("device");
    const std::string dtype_text = options.text("dtype");
    const auto floating = [](const std::string& name, const char* what) {
      if (name != "float32" && name != "float64" && name != "bfloat16")
        throw CodedError("INVALID_ARGUMENT",
                         std::string("[session] expected ") + what + " float32, float64 or bfloat16, got " + name);
      return dtype_from_name(name);
    };
    spec.dtype = floating(dtype_text, "dtype");
    const bool is_cuda = device.rfind("cuda:", 0) == 0 && device.size() > 5 && device.size() < 9 &&
                         device.find_first_not_of("0123456789", 5) == std::string::npos;
    if (device != "cpu" && device != "sim" && !is_cuda)
      throw CodedError("INVALID_ARGUMENT", "[session] expected device cpu, sim or cuda:N, got " + device);
    spec.reads_late = device != "cpu";
    if (is_cuda) spec.device = at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(std::stoi(device.substr(5))));
    threads_ = static_cast<int>(options.integer("threads"));
    if (threads_ < 0) throw CodedError("INVALID_ARGUMENT", "[session] expected threads >= 0 (0: all)");
    if (threads_ == 0) threads_ = at::get_num_threads();
    const Fields optimizer(options.at("optimizer"), "options.optimizer");
    const std::string kind = optimizer.text("kind");
    if (kind != "adamw" && kind != "adamw8bit")
      throw CodedError("INVALID_ARGUMENT", "[session] expected optimizer.kind \"adamw\" or \"adamw8bit\", got " + kind);
    spec.optimizer = {optimizer.number("beta1"), optimizer.number("beta2"), optimizer.number("epsilon"),
                      optimizer.number("weightDecay")};
    spec.format.eight_bit = kind == "adamw8bit";
    spec.format.storage = options.has("storage") ? floating(options.text("storage"), "storage") : spec.dtype;
    const std::string master = options.has("masterWeight")            ? options.text("masterWeight")
                               : spec.format.storage == at::kBFloat16 ? "float32"
                                                                      : "none";
    using engine::MasterWeight;
    if (master != "none" && master != "split16" && master != "float32")
      throw CodedError("INVALID_ARGUMENT", "[session] expected masterWeight none, split16 or float32, got " + master);
    if (master != "none" && spec.format.storage != at::kBFloat16)
      throw CodedError("CONFIG", "[session] masterWeight \"" + master + "\" is for parameters stored in bfloat16");
    spec.format.master = master == "none"      ? MasterWeight::kNone
                         : master == "split16" ? MasterWeight::kSplit16
                                               : MasterWeight::kFloat32;
    if (spec.format.eight_bit && spec.dtype == at::kDouble)
      throw CodedError("CONFIG",
                       "[session] 8-bit moments are for float32 and bfloat16 graphs, not float64: use \"adamw\"");
    if (options.has("sim")) {
      if (device != "sim") throw CodedError("CONFIG", "[session] options.sim is for device \"sim\"");
      const Fields sim(options.at("sim"), "options.sim");
      const auto rate = [&sim](const char* name) -> std::optional<double> {
        if (sim.at(name).IsNull()) return std::nullopt;
        const double value = sim.number(name);
        if (!(value > 0)) throw CodedError("INVALID_ARGUMENT", "[session] expected " + sim.path(name) + " above 0");
        return value;
      };
      if (!sim.at("memoryBytes").IsNull()) spec.device_bytes = sim.integer("memoryBytes");
      spec.sim.host_to_device = rate("hostToDevice");
      spec.sim.device_to_host = rate("deviceToHost");
      if (!sim.at("adversary").IsNull()) spec.sim.adversary = sim.integer("adversary");
    }
    if (options.has("deviceMemory")) {
      if (!is_cuda)
        throw CodedError("CONFIG",
                         "[session] options.deviceMemory is for a CUDA device; sim.memoryBytes caps a simulated one");
      spec.device_bytes = options.integer("deviceMemory");
    }
    if (options.has("diskFolder")) spec.disk_folder = options.text("diskFolder");
    if (options.has("ranks")) spec.ranks = ranks_of(options.at("ranks"));
    if (options.has("transport")) {
      const std::string transport = options.text("transport");
      if (transport != "nccl" && transport != "gloo")
        throw CodedError("INVALID_ARGUMENT", "[session] expected transport nccl or gloo, got " + transport);
      spec.over_nccl = transport == "nccl";
      if (spec.over_nccl && (!is_cuda || !spec.ranks))
        throw CodedError("CONFIG", "[session] transport \"nccl\" is between ranks on CUDA devices: with device \"" +
                                       device + (spec.ranks ? "\"" : "\" and no ranks") + " use \"gloo\"");
    }
    if (options.has("context")) spec.context = options.integers("context");
    if (!spec.context.empty() && !spec.ranks)
      throw CodedError("CONFIG", "[session] options.context is for a session with options.ranks");
    core_ = std::make_shared<Core>();
    core_->executor = std::make_unique<engine::Executor>(spec);
    lane_ = std::make_shared<Lane>(
        info.Env(), "stroma session",
        [threads = threads_] {
          at::set_num_threads(threads);
          // Backward runs on this thread, in autograd's own order.
          c10::AutogradState::get_tls_state().set_multithreading_enabled(false);
        },
        [core = core_] {
          core->cancelled = true;
          core->disposed = true;
        });
  }

  Napi::Value post(const Napi::CallbackInfo& info, std::function<Finish(engine::Executor&)> work) {
    if (core_->disposed) throw CodedError("DISPOSED", "[session] this session was disposed");
    return lane_->post(info, [core = core_, work = std::move(work)] { return work(core->use()); });
  }

  Napi::Value load(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      auto graph = std::make_shared<engine::Graph>(decode_graph(info[0]));
      std::optional<engine::Placement> placement;
      if (info.Length() > 1 && !info[1].IsUndefined()) placement = decode_placement(info[1], "placement");
      return post(info, [graph, placement, core = core_](engine::Executor& executor) -> Finish {
        executor.load(std::move(*graph), placement);
        core->state_bytes = executor.state().bytes();
        return {};
      });
    });
  }
  Napi::Value attach(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      auto graph = std::make_shared<engine::Graph>(decode_graph(info[1]));
      return post(info, [graph, name = text(info, 0, "name")](engine::Executor& executor) -> Finish {
        executor.attach(name, std::move(*graph));
        return {};
      });
    });
  }
  Napi::Value initialize(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      return post(info, [seed = integer(info, 0, "seed")](engine::Executor& executor) -> Finish {
        executor.state().initialize(seed);
        return {};
      });
    });
  }

  Napi::Value step(const Napi::CallbackInfo& info) {
    return entry(info, [&]() -> Napi::Value {
      if (lane_->queued() >= kMostQueued)
        throw CodedError("BUSY",
                         "[session] " + std::to_string(kMostQueued) + " tasks are under way. Await a step first");
      const Fields fields(info[0], "request");
      auto request = std::make_shared<engine::StepRequest>();
      request->tape = tape_.decode(fields.at("tape"));
      if (fields.has("flush")) request->flush = flush_.decode(fields.at("flush"));
      if (fields.has("profile")) request->profile = fields.flag("profile");
      const Napi::Array batches = fields.array("microBatches");
      for (uint32_t i = 0; i < batches.Length(); ++i)
        request->micro_batches.push_back(decode_batch(batches.Get(i), "microBatches[" + std::to_string(i) + "]"));
      request->counts = decode_counts(fields.at("counts"));
      request->step = fields.integer("step");
      request->seed = fields.integer("seed");
      request->learning_rate = fields.number("learningRate");
      if (!std::isfinite(request->learning_rate))
        throw CodedError("INVALID_ARGUMENT", "[session] expected a finite learningRate");
      const Napi::Value clip = fields.at("maxGradNorm");
      if (!clip.IsNull()) {
        request->max_grad_norm = fields.number("maxGradNorm");
        if (!(*request->max_grad_norm > 0))
          throw CodedError("INVALID_ARGUMENT", "[session] expected maxGradNorm > 0, or null for no clipping");
      }
      core_->cancelled = false;
      return post(info, [request, core = core_](engine::Executor& executor) -> Finish {
        auto result = std::make_shared<engine::StepResult>(executor.step(*request, core->cancelled));
        std::vector<std::string> names;
        for (const auto& term : executor.graph().losses) names.push_back(term.name);
        return [result, names](Napi::Env env) { return encode(env, *result, names); };
      });
    });
  }

  static Napi::Object encode_profile(Napi::Env env, const engine::StepResult& result) {
    const engine::Profile& profile = *result.profile;
    const size_t n = profile.device_bytes.size();
    Napi::Object out = Napi::Object::New(env);
    const auto set = [&](const char* name, auto&& value) {
      Napi::Float64Array column = Napi::Float64Array::New(env, n);
      for (size_t i = 0; i < n; ++i) column[i] = value(i);
      out.Set(name, column);
    };
    // What never ran (after a loss that was not finite) stands at the beginning.
    const auto ms = [&](double at) { return at == 0 ? 0.0 : (at - result.begin) * 1e3; };
    set("startMs", [&](size_t i) { return ms(profile.timeline.start[i]); });
    set("endMs", [&](size_t i) { return ms(profile.timeline.end[i]); });
    set("deviceBytes", [&](size_t i) { return static_cast<double>(profile.device_bytes[i]); });
    set("devicePeakBytes", [&](size_t i) { return static_cast<double>(profile.device_peak[i]); });
    set("hostBytes", [&](size_t) { return static_cast<double>(result.host_bytes); });
    return out;
  }

  static Napi::Value encode(Napi::Env env, const engine::StepResult& result, const std::vector<std::string>& names) {
    Napi::Object out = Napi::Object::New(env), losses = Napi::Object::New(env), counts = Napi::Object::New(env);
    for (size_t i = 0; i < names.size(); ++i) {
      losses.Set(names[i], result.losses[i]);
      counts.Set(names[i], static_cast<double>(result.counts[i]));
    }
    Napi::Array micro = Napi::Array::New(env, result.micro_batch_losses.size());
    for (size_t m = 0; m < result.micro_batch_losses.size(); ++m)
      micro.Set(static_cast<uint32_t>(m), result.micro_batch_losses[m]);
    out.Set("losses", losses);
    out.Set("counts", counts);
    out.Set("loss", result.loss);
    out.Set("microBatchLosses", micro);
    out.Set("gradNorm", result.grad_norm);
    if (result.finite) {
      out.Set("nonFinite", env.Null());
    } else {
      Napi::Object non_finite = Napi::Object::New(env);
      non_finite.Set("microBatch", result.non_finite_micro_batch);
      non_finite.Set("loss", result.non_finite_loss);
      out.Set("nonFinite", non_finite);
    }
    out.Set("seconds", result.seconds);
    const char* moved[engine::kCopyQueues] = {"bytesToDevice", "bytesFromDevice", "bytesLoaded",
                                              "bytesSaved",    "bytesSent",       "bytesReceived"};
    for (int q = 0; q < engine::kCopyQueues; ++q) out.Set(moved[q], static_cast<double>(result.copied.bytes[q]));
    Napi::Array skipped = Napi::Array::New(env, result.skipped_blocks.size());
    for (size_t i = 0; i < result.skipped_blocks.size(); ++i)
      skipped.Set(static_cast<uint32_t>(i), result.skipped_blocks[i]);
    out.Set("skippedBlocks", skipped);
    if (result.profile.has_value()) out.Set("profile", encode_profile(env, result));
    out.Set("newDeviceSegments", static_cast<double>(result.new_segments));
    out.Set("peakDeviceBytes", static_cast<double>(result.peak_device_bytes));
    out.Set("peakHostBytes", static_cast<double>(result.peak_host_bytes));
    return out;
  }

  Napi::Value run(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      auto batch = std::make_shared<engine::Batch>(decode_batch(info[1], "batch"));
      int64_t seed = 0;
      std::map<std::string, int64_t> counts;
      if (info.Length() > 2 && info[2].IsObject()) {
        const Fields options(info[2], "options");
        if (options.has("seed")) seed = options.integer("seed");
        counts = decode_counts(options.at("counts"));
      }
      return post(info, [batch, seed, counts, name = text(info, 0, "name")](engine::Executor& executor) -> Finish {
        auto outputs = std::make_shared<std::map<std::string, at::Tensor>>(executor.run(name, *batch, seed, counts));
        return [outputs](Napi::Env env) -> Napi::Value {
          Napi::Object result = Napi::Object::New(env);
          for (const auto& [key, tensor] : *outputs) result.Set(key, host_tensor_to_js(env, tensor));
          return result;
        };
      });
    });
  }

  Napi::Value flush(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      return post(info, [](engine::Executor& executor) -> Finish {
        executor.state();
        return {};
      });
    });
  }

  static Finish give(at::Tensor tensor) {
    return [tensor = std::move(tensor)](Napi::Env env) -> Napi::Value { return host_tensor_to_js(env, tensor); };
  }
  Napi::Value gradient(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      return post(info, [name = text(info, 0, "name")](engine::Executor& executor) {
        return give(executor.gradient(name).to(at::kCPU, /*non_blocking=*/false, /*copy=*/true));
      });
    });
  }
  Napi::Value read(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      const auto kind = engine::state_kind_from_name(text(info, 0, "kind"));
      return post(info, [kind, name = text(info, 1, "name")](engine::Executor& executor) {
        const at::NoGradGuard no_grad;
        const engine::Parameter& parameter = executor.state().find(name);
        if (!executor.state().holds(kind, parameter))
          engine::fail("INVALID_ARGUMENT", "[session] this model holds no ", engine::state_kind_name(kind), " of ",
                       name);
        return give(executor.state().tensor(kind, parameter).to(at::kCPU, /*non_blocking=*/false, /*copy=*/true));
      });
    });
  }
  Napi::Value write(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      const auto kind = engine::state_kind_from_name(text(info, 0, "kind"));
      const at::Tensor value = host_tensor_from_js(info[2], "tensor");
      return post(info, [kind, value, name = text(info, 1, "name")](engine::Executor& executor) -> Finish {
        const at::NoGradGuard no_grad;
        executor.state().assign(kind, executor.state().find(name), value);
        return {};
      });
    });
  }
  Napi::Value state(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      return post(info, [](engine::Executor& executor) -> Finish {
        struct Row {
          std::string kind, name, dtype;
          std::vector<int64_t> shape;  // of the whole tensor
          int64_t begin, bytes;        // of it, what is here
        };
        std::vector<Row> rows;
        const engine::ModelState& state = executor.state();
        for (const engine::Parameter& p : state.parameters)
          for (int k = 0; k < engine::kStateKinds; ++k) {
            const auto kind = static_cast<engine::StateKind>(k);
            if (!state.holds(kind, p)) continue;
            const auto shape = state.shape_of(kind, p);
            const at::ScalarType dtype = state.dtype_of(kind);
            const int64_t itemsize = static_cast<int64_t>(c10::elementSize(dtype));
            rows.push_back({engine::state_kind_name(kind), p.spec.name, dtype_name(dtype),
                            state.whole_shape_of(kind, p), state.begin_of(kind, p) * itemsize,
                            c10::multiply_integers(shape) * itemsize});
          }
        return [rows = std::move(rows)](Napi::Env env) -> Napi::Value {
          Napi::Array result = Napi::Array::New(env, rows.size());
          for (uint32_t i = 0; i < rows.size(); ++i) {
            Napi::Object row = Napi::Object::New(env);
            row.Set("kind", rows[i].kind);
            row.Set("name", rows[i].name);
            row.Set("dtype", rows[i].dtype);
            Napi::Array shape = Napi::Array::New(env, rows[i].shape.size());
            for (uint32_t d = 0; d < rows[i].shape.size(); ++d) shape.Set(d, static_cast<double>(rows[i].shape[d]));
            row.Set("shape", shape);
            row.Set("begin", static_cast<double>(rows[i].begin));
            row.Set("bytes", static_cast<double>(rows[i].bytes));
            result.Set(i, row);
          }
          return result;
        };
      });
    });
  }
  Napi::Value optimizer_step(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      return post(info, [](engine::Executor& executor) -> Finish {
        int64_t most = 0;
        for (const engine::Parameter& p : executor.state().parameters) most = std::max(most, p.updates);
        return [most](Napi::Env env) -> Napi::Value { return Napi::Number::New(env, static_cast<double>(most)); };
      });
    });
  }
  Napi::Value set_optimizer_step(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      const int64_t step = integer(info, 0, "step");
      if (step < 0) throw CodedError("INVALID_ARGUMENT", "[session] expected step >= 0");
      return post(info, [step](engine::Executor& executor) -> Finish {
        for (engine::Parameter& p : executor.state().parameters)
          if (p.spec.trainable) p.updates = step;
        return {};
      });
    });
  }
  Napi::Value snapshot(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      return post(info,
                  [kinds = decode_kinds(info[0]), lane = lane_, core = core_](engine::Executor& executor) -> Finish {
                    auto data = std::make_shared<engine::Snapshot>(executor.state(), kinds);
                    return [data, lane, core](Napi::Env env) -> Napi::Value {
                      SnapshotWrap::Made made{data, lane, [core] { core->use(); }};
                      return door(env).snapshot.New({Napi::External<SnapshotWrap::Made>::New(env, &made)});
                    };
                  });
    });
  }
  Napi::Value read_file(const Napi::CallbackInfo& info) {
    return entry(info, [&] {
      return post(info,
                  [path = text(info, 0, "path"), entries = decode_entries(info[1]),
                   threads = threads_](engine::Executor& executor) -> Finish {
                    engine::read_state(executor.state(), path, entries, threads);
                    return {};
                  });
    });
  }
  Napi::Value cancel(const Napi::CallbackInfo& info) {
    core_->cancelled = true;
    return info.Env().Undefined();
  }
  Napi::Value dispose(const Napi::CallbackInfo& info) {
    return entry(info, [&]() -> Napi::Value {
      if (!core_->disposed) {
        core_->cancelled = true;
        core_->disposed = true;
        // Behind what is queued, which now ends at once; JavaScript's thread does not wait.
        const Napi::Value done = lane_->post(info, [core = core_]() -> Finish {
          core->executor.reset();
          core->state_bytes = 0;
          engine::trim_host_memory();
          engine::cuda::give_back();
          return {};
        });
        lane_->retire();
        return done;
      }
      return info.Env().Undefined();
    });
  }
  Napi::Value stats(const Napi::CallbackInfo& info) {
    return entry(info, [&]() -> Napi::Value {
      const engine::HostMemory memory = engine::host_memory();
      Napi::Object result = Napi::Object::New(info.Env());
      result.Set("queued", static_cast<double>(lane_->queued()));
      result.Set("stateBytes", static_cast<double>(core_->state_bytes.load()));
      result.Set("liveBytes", static_cast<double>(memory.live));
      result.Set("cachedBytes", static_cast<double>(memory.cached));
      return result;
    });
  }

  static std::string text(const Napi::CallbackInfo& info, size_t index, const char* name) {
    if (info.Length() <= index || !info[index].IsString())
      throw CodedError("INVALID_ARGUMENT", std::string("[session] expected a string for ") + name);
    return info[index].As<Napi::String>().Utf8Value();
  }
  static int64_t integer(const Napi::CallbackInfo& info, size_t index, const char* name) {
    if (info.Length() <= index || !info[index].IsNumber())
      throw CodedError("INVALID_ARGUMENT", std::string("[session] expected an integer for ") + name);
    const double x = info[index].As<Napi::Number>().DoubleValue();
    if (x != std::floor(x) || std::abs(x) > 9007199254740991.0)
      throw CodedError("INVALID_ARGUMENT", std::string("[session] expected a safe integer for ") + name);
    return static_cast<int64_t>(x);
  }

  int threads_ = 0;
  std::shared_ptr<Core> core_;
  std::shared_ptr<Lane> lane_;
  // The same tape object is decoded once: it is thousands of instructions, and stays the same for a whole run.
  struct CachedTape {
    Napi::ObjectReference object;
    std::shared_ptr<const engine::Tape> tape;
    const std::shared_ptr<const engine::Tape>& decode(const Napi::Value& value) {
      if (object.IsEmpty() || !object.Value().StrictEquals(value)) {
        tape = decode_tape(value);
        object = Napi::Persistent(value.As<Napi::Object>());
      }
      return tape;
    }
  };
  CachedTape tape_, flush_;
};

}  // namespace

void export_session(Napi::Env env, Napi::Object exports) {
  auto made = std::make_shared<Door>();
  made->session = Napi::Persistent(SessionWrap::define(env));
  made->snapshot = Napi::Persistent(SnapshotWrap::define(env));
  env_state(env).sessions = made;
  exports.Set("endThreads", Napi::Function::New(env, [](const Napi::CallbackInfo&) { end_all_lanes(); }));
  exports.Set("createSession", Napi::Function::New(env, [](const Napi::CallbackInfo& info) -> Napi::Value {
                return entry(info, [&]() -> Napi::Value {
                  return door(info.Env()).session.New({info.Length() > 0 ? info[0] : info.Env().Undefined()});
                });
              }));
}

}  // namespace stroma
