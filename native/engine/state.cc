#include "engine/state.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "engine/error.h"

namespace stroma::engine {
namespace {

constexpr int64_t kPiece = 1 << 20;  // elements drawn at a time

constexpr const char* kNames[kStateKinds] = {"param",  "master", "low",     "exp_avg", "exp_avg_sq",
                                             "state1", "state2", "absmax1", "absmax2", "step"};

// FNV-1a over the name, mixed with the seed: every parameter draws from its own stream, whatever the others are.
uint64_t stream_of(int64_t seed, const std::string& name) {
  uint64_t h = 0xcbf29ce484222325ull;
  const auto eat = [&h](uint8_t byte) { h = (h ^ byte) * 0x100000001b3ull; };
  for (int i = 0; i < 8; ++i) eat(static_cast<uint8_t>(static_cast<uint64_t>(seed) >> (8 * i)));
  for (const char c : name) eat(static_cast<uint8_t>(c));
  return h;
}

void check_home(const std::optional<Place>& home, int64_t bytes, const char* what, const std::string& block) {
  const int64_t planned = home.has_value() ? home->bytes : 0;
  if (planned != bytes)
    fail("TAPE", "[tape] expected ", bytes, " bytes for the home of ", what, " of ", block, ", got ", planned,
         ". Plan for this graph and this storage, masterWeight and optimizer");
}

}  // namespace

const char* state_kind_name(StateKind kind) { return kNames[static_cast<int>(kind)]; }

StateKind state_kind_from_name(const std::string& name) {
  for (int i = 0; i < kStateKinds; ++i)
    if (name == kNames[i]) return static_cast<StateKind>(i);
  std::string all;
  for (const char* known : kNames) all += (all.empty() ? "" : ", ") + std::string(known);
  fail("INVALID_ARGUMENT", "[session] expected a kind of state (", all, "), got \"", name, "\"");
}

ModelState::ModelState(const Graph& graph, at::ScalarType dtype, const StateFormat& format,
                       std::optional<Placement> placement, at::Device device, Account& account,
                       const std::string& disk_folder, bool among_ranks, at::Tensor shared)
    : dtype_(dtype), device_(device), format_(format) {
  const Stages stages = placement.has_value() && placement->stages.has_value() ? *placement->stages : Stages{};
  layout = layout_blocks(graph, dtype, format, stages.shards, stages.shard());
  placement_ = placement.has_value() ? std::move(*placement) : resident_placement(layout);
  if (placement_.param.size() != layout.size() || placement_.state.size() != layout.size())
    fail("TAPE", "[tape] expected homes for ", layout.size(), " blocks, got ", placement_.param.size());
  parameters.resize(graph.parameters.size());
  for (size_t i = 0; i < parameters.size(); ++i) {
    parameters[i].spec = graph.parameters[i];
    parameters[i].layout = {-1, 0, 0, 0};
    index_.emplace(parameters[i].spec.name, static_cast<int>(i));
  }
  if (placement_.stages.has_value() != among_ranks)
    fail("TAPE", "[tape] expected a plan for ", among_ranks ? "several ranks" : "one rank", ", got one for ",
         among_ranks ? "one rank" : "several ranks");
  for (size_t b = 0; b < layout.size(); ++b) {
    const bool mine = placement_.is_mine(b);
    check_home(placement_.param[b], mine ? layout[b].param_bytes : 0, "parameters", graph.blocks[b].name);
    check_home(placement_.state[b], mine ? layout[b].state_bytes : 0, "optimizer state", graph.blocks[b].name);
    for (const TensorLayout& t : layout[b].owned) {
      Parameter& p = parameters[t.parameter];
      p.layout.parameter = t.parameter;
      p.offset = t.param;
    }
    for (const auto* list : {&layout[b].trainable, &layout[b].frozen})
      for (const TensorLayout& t : *list) {
        parameters[t.parameter].layout = t;
        parameters[t.parameter].held = mine;
      }
    for (size_t i = 0; i < layout[b].sums.size(); ++i)
      if (layout[b].sums[i] >= 0)
        parameters[graph.blocks[b].parameters[i]].uses.emplace_back(static_cast<int>(b), static_cast<int>(i));
  }
  for (const Parameter& p : parameters)
    if (p.layout.parameter < 0)
      fail("GRAPH", "[graph] parameter ", p.spec.name, " is owned by block ", p.spec.owner, ", which does not use it");
  memory_ = std::make_unique<Memory>(placement_, device, account, disk_folder, std::move(shared));
  placement_.shared.resize(layout.size());
  for (size_t b = 0; b < layout.size(); ++b) {
    if (!placement_.shared[b].has_value()) continue;
    int64_t bytes = 0;
    for (int shard = 0; shard < stages.shards; ++shard)
      bytes += round_up(
          layout[b].shard(layout[b].all, shard).size() * static_cast<int64_t>(c10::elementSize(format.storage)), kPage);
    check_home(placement_.shared[b], bytes, "shared parameters", graph.blocks[b].name);
  }
  for (const auto* homes : {&placement_.param, &placement_.state, &placement_.shared})
    for (const std::optional<Place>& home : *homes)
      if (home.has_value()) memory_->check(*home, "a home");
}

Parameter& ModelState::find(const std::string& name) {
  const auto it = index_.find(name);
  if (it == index_.end()) fail("INVALID_ARGUMENT", "[session] the model has no parameter named \"", name, "\"");
  return parameters[it->second];
}

bool ModelState::holds(StateKind kind, const Parameter& p) const {
  if (!owns(p)) return false;
  if (kind == StateKind::kParam) return true;
  if (!p.spec.trainable) return false;
  switch (kind) {
    case StateKind::kMaster:
      return format_.master == MasterWeight::kFloat32;
    case StateKind::kLow:
      return format_.master == MasterWeight::kSplit16;
    case StateKind::kExpAvg:
    case StateKind::kExpAvgSq:
      return !p.layout.quantized;
    case StateKind::kState1:
    case StateKind::kState2:
    case StateKind::kAbsmax1:
    case StateKind::kAbsmax2:
      return p.layout.quantized;
    default:
      return true;
  }
}

at::ScalarType ModelState::dtype_of(StateKind kind) const {
  switch (kind) {
    case StateKind::kParam:
      return format_.storage;
    case StateKind::kLow:
      return at::kShort;
    case StateKind::kExpAvg:
    case StateKind::kExpAvgSq:
      return wide();
    case StateKind::kState1:
    case StateKind::kState2:
      return at::kByte;
    case StateKind::kStep:
      return at::kLong;
    default:
      return at::kFloat;
  }
}

bool ModelState::holds_whole(const Parameter& p) const {
  return p.held && p.layout.elements == c10::multiply_integers(p.spec.shape);
}

std::vector<int64_t> ModelState::shape_of(StateKind kind, const Parameter& p) const {
  if (kind == StateKind::kStep) return {};
  if (kind == StateKind::kAbsmax1 || kind == StateKind::kAbsmax2)
    return {(p.layout.elements + kAlignElements - 1) / kAlignElements};
  if (!holds_whole(p)) return {p.layout.elements};
  return p.spec.shape;
}

std::vector<int64_t> ModelState::whole_shape_of(StateKind kind, const Parameter& p) const {
  if (kind == StateKind::kStep) return {};
  if (kind == StateKind::kAbsmax1 || kind == StateKind::kAbsmax2)
    return {(c10::multiply_integers(p.spec.shape) + kAlignElements - 1) / kAlignElements};
  return p.spec.shape;
}

int64_t ModelState::begin_of(StateKind kind, const Parameter& p) const {
  if (kind == StateKind::kStep) return 0;
  const bool scales = kind == StateKind::kAbsmax1 || kind == StateKind::kAbsmax2;
  return scales ? p.layout.begin / kAlignElements : p.layout.begin;
}

ModelState::Range ModelState::range(StateKind kind, const Parameter& p) const {
  const TensorLayout& t = p.layout;
  const size_t owner = static_cast<size_t>(p.spec.owner);
  const int64_t itemsize = static_cast<int64_t>(c10::elementSize(dtype_of(kind)));
  const int64_t bytes = c10::multiply_integers(shape_of(kind, p)) * itemsize;
  switch (kind) {
    case StateKind::kParam:
      return {&*placement_.param[owner], t.param * itemsize, bytes};
    case StateKind::kMaster:
    case StateKind::kLow:
      return {&*placement_.state[owner], t.master, bytes};
    case StateKind::kExpAvg:
    case StateKind::kState1:
      return {&*placement_.state[owner], t.first, bytes};
    case StateKind::kExpAvgSq:
    case StateKind::kState2:
      return {&*placement_.state[owner], t.second, bytes};
    case StateKind::kAbsmax1:
      return {&*placement_.state[owner], t.absmax1, bytes};
    default:
      return {&*placement_.state[owner], t.absmax2, bytes};
  }
}

bool ModelState::in_host_memory(StateKind kind, const Parameter& p) const {
  if (kind == StateKind::kStep || !owns(p)) return false;
  const Space space = range(kind, p).home->space;
  return space == Space::kHost || space == Space::kShared || (space == Space::kDevice && device_.is_cpu());
}

bool ModelState::fits_twice() const {
  for (const auto* homes : {&placement_.param, &placement_.state})
    for (const std::optional<Place>& home : *homes)
      if (home.has_value() && home->space == Space::kDisk) return false;
  return bytes() < available_host_bytes() / 2;
}

at::Tensor ModelState::tensor(StateKind kind, const Parameter& p) const {
  if (!owns(p)) fail("INVALID_ARGUMENT", "[session] another rank holds ", p.spec.name);
  if (kind == StateKind::kStep) return at::scalar_tensor(p.updates, at::kLong);
  const Range r = range(kind, p);
  if (r.home->space != Space::kDisk) return memory_->view(*r.home, r.offset, shape_of(kind, p), dtype_of(kind));
  at::Tensor copy = at::empty(shape_of(kind, p), at::dtype(dtype_of(kind)));
  memory_->access(*r.home, r.offset, copy.mutable_data_ptr(), r.bytes, /*write=*/false);
  return copy;
}

void ModelState::put(StateKind kind, const Parameter& p, const at::Tensor& value, int64_t first) {
  const Range r = range(kind, p);
  const int64_t offset = r.offset + first * static_cast<int64_t>(c10::elementSize(dtype_of(kind)));
  if (r.home->space != Space::kDisk) {
    memory_->view(*r.home, offset, value.sizes(), dtype_of(kind)).copy_(value);
    return;
  }
  const at::Tensor bytes = value.to(at::kCPU, dtype_of(kind)).contiguous();
  memory_->access(*r.home, offset, const_cast<void*>(bytes.const_data_ptr()), static_cast<int64_t>(bytes.nbytes()),
                  /*write=*/true);
}

void ModelState::put_weight(const Parameter& p, const at::Tensor& value, int64_t first) {
  if (holds(StateKind::kLow, p)) {
    // hi: the nearest bfloat16 (ties away from zero), low: what it lacks, as the bits' difference.
    const at::Tensor bits = value.to(at::kFloat).contiguous().view(at::kInt);
    const at::Tensor high = bits.add(0x8000).bitwise_right_shift(16);
    put(StateKind::kParam, p, high.to(at::kShort).view(at::kBFloat16), first);
    put(StateKind::kLow, p, bits.sub(high.bitwise_left_shift(16)).to(at::kShort), first);
    return;
  }
  put(StateKind::kParam, p, value, first);
  if (holds(StateKind::kMaster, p)) put(StateKind::kMaster, p, value, first);
}

void ModelState::assign(StateKind kind, Parameter& p, const at::Tensor& value) {
  if (!owns(p)) fail("INVALID_ARGUMENT", "[session] another rank holds ", p.spec.name);
  if (kind == StateKind::kStep) {
    const int64_t step = value.item<int64_t>();
    if (step < 0) fail("INVALID_ARGUMENT", "[session] expected step >= 0 of ", p.spec.name, ", got ", step);
    p.updates = step;
    return;
  }
  if (!holds(kind, p))
    fail("INVALID_ARGUMENT", "[session] this model holds no ", state_kind_name(kind), " of ", p.spec.name);
  if (value.sizes() != at::IntArrayRef(shape_of(kind, p)))
    fail("INVALID_ARGUMENT", "[session] expected ", state_kind_name(kind), " of ", p.spec.name, " of shape ",
         at::IntArrayRef(shape_of(kind, p)), ", got ", value.sizes());
  if (kind == StateKind::kParam) {
    put_weight(p, value);
    return;
  }
  put(kind, p, value);
  if (kind == StateKind::kMaster) put(StateKind::kParam, p, value);
}

void ModelState::draw(Parameter& p, int64_t seed) {
  const Init& init = p.spec.init;
  const int64_t count = c10::multiply_integers(p.spec.shape), begin = p.layout.begin, end = begin + p.layout.elements;
  auto generator = at::detail::createCPUGenerator(stream_of(seed, p.spec.name));
  for (int64_t at = 0; at < count;) {
    // ATen makes normal values of sixteen uniform ones at a time, and the last sixteen anew where some are left over:
    // pieces of whole sixteens, the last of no fewer, hold what one draw of them all would.
    const int64_t n = count - at < kPiece + 16 ? count - at : kPiece;
    at::Tensor drawn = at::empty({n}, at::TensorOptions().dtype(wide()));
    switch (init.kind) {
      case Init::Kind::kNormal:
        drawn.normal_(0, init.a, generator);
        break;
      case Init::Kind::kUniform:
        drawn.uniform_(init.a, init.b, generator);
        break;
      case Init::Kind::kZeros:
        drawn.zero_();
        break;
      case Init::Kind::kOnes:
        drawn.fill_(1);
        break;
    }
    const int64_t from = std::max(at, begin), to = std::min(at + n, end);
    if (from < to) put_weight(p, drawn.narrow(0, from - at, to - from), from - begin);
    at += n;
  }
  p.updates = 0;
}

void ModelState::initialize(int64_t seed) {
  bool on_disk = false;
  for (const auto* homes : {&placement_.param, &placement_.state})
    for (const std::optional<Place>& home : *homes)
      if (home.has_value()) on_disk |= home->space == Space::kDisk;
  for (const std::optional<Place>& home : placement_.state)
    if (home.has_value()) memory_->zero(*home);
  // A draw is one thread's work, and each parameter has a generator of its own: threads take one after the other.
  std::atomic<size_t> next{0};
  at::parallel_for(0, on_disk ? 1 : at::get_num_threads(), 1, [&](int64_t, int64_t) {
    for (size_t i = next++; i < parameters.size(); i = next++)
      if (owns(parameters[i])) draw(parameters[i], seed);
  });
}

int64_t ModelState::bytes() const {
  int64_t total = 0;
  for (const auto* homes : {&placement_.param, &placement_.state})
    for (const std::optional<Place>& home : *homes)
      if (home.has_value()) total += home->bytes;
  return total;
}

int64_t ModelState::host_bytes() const {
  int64_t total = memory_->host_bytes();
  for (const std::optional<Place>& home : placement_.param)
    if (home.has_value() && home->space == Space::kShared) total += home->bytes;
  return total;
}

}  // namespace stroma::engine
