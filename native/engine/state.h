// What a model is between steps: parameters and optimizer state, flat per block, at the homes that a placement gives.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <unordered_map>

#include "engine/layout.h"
#include "engine/memory.h"

namespace stroma::engine {

// In the order in which a file's tensors are assigned: what is finer comes after what is coarser.
enum class StateKind : uint8_t {
  kParam,
  kMaster,
  kLow,
  kExpAvg,
  kExpAvgSq,
  kState1,
  kState2,
  kAbsmax1,
  kAbsmax2,
  kStep
};
constexpr int kStateKinds = 10;
const char* state_kind_name(StateKind kind);
StateKind state_kind_from_name(const std::string& name);  // throws INVALID_ARGUMENT

struct Parameter {
  ParameterSpec spec;
  TensorLayout layout;  // of what is here: all of it, nothing, or with shards a part
  bool held = false;    // whether something is
  int64_t offset = 0;   // in elements, in all that its owner owns
  int64_t updates = 0;  // PyTorch's `step` of this parameter
  // One gradient sum per use (tied parameters have several): {block, index among the block's parameters}.
  std::vector<std::pair<int, int>> uses;
};

class ModelState {
 public:
  // dtype: of the graph; shared: memory in common with other ranks, where the placement has some. Throws TAPE for a
  // placement that does not fit, OUT_OF_MEMORY, DISK_FULL.
  ModelState(const Graph& graph, at::ScalarType dtype, const StateFormat& format, std::optional<Placement> placement,
             at::Device device, Account& account, const std::string& disk_folder, bool among_ranks,
             at::Tensor shared = {});

  std::vector<Parameter> parameters;
  std::vector<BlockLayout> layout;  // by block

  Parameter& find(const std::string& name);  // throws INVALID_ARGUMENT
  // False: other ranks hold it, and this one no state of it.
  bool owns(const Parameter& parameter) const { return parameter.held; }
  // False: this rank holds a part of it, all kinds of state of which are flat.
  bool holds_whole(const Parameter& parameter) const;
  // False where this model has no such kind (moments of a frozen parameter, masters of an fp32 model).
  bool holds(StateKind kind, const Parameter& parameter) const;
  at::ScalarType dtype_of(StateKind kind) const;
  std::vector<int64_t> shape_of(StateKind kind, const Parameter& parameter) const;
  // Of the whole tensor, and the first element of it that is here.
  std::vector<int64_t> whole_shape_of(StateKind kind, const Parameter& parameter) const;
  int64_t begin_of(StateKind kind, const Parameter& parameter) const;
  // Whether tensor() is a view that this process may read and write directly.
  bool in_host_memory(StateKind kind, const Parameter& parameter) const;
  // Whether this machine's free memory holds a copy of all of it (never when some lies on disk).
  bool fits_twice() const;
  // A view of its home where that is memory, else a copy.
  at::Tensor tensor(StateKind kind, const Parameter& parameter) const;
  // Copies into the state, converting; keeps the compute copy and the master in step.
  void assign(StateKind kind, Parameter& parameter, const at::Tensor& value);
  void initialize(int64_t seed);
  int64_t bytes() const;
  // Of host memory, what this session holds of it beside others that share it.
  int64_t host_bytes() const;
  at::ScalarType dtype() const { return dtype_; }
  at::ScalarType wide() const { return wide_of(dtype_); }
  const StateFormat& format() const { return format_; }
  const Placement& placement() const { return placement_; }
  const Memory& memory() const { return *memory_; }

 private:
  struct Range {
    const Place* home;
    int64_t offset, bytes;
  };
  Range range(StateKind kind, const Parameter& parameter) const;
  // Converting, from element `first` of what is here on.
  void put(StateKind kind, const Parameter& parameter, const at::Tensor& value, int64_t first = 0);
  // A weight as it is kept: the parameter, and the master or the lower halves beside it.
  void put_weight(const Parameter& parameter, const at::Tensor& value, int64_t first = 0);
  void draw(Parameter& parameter, int64_t seed);

  at::ScalarType dtype_;
  at::Device device_;
  StateFormat format_;
  Placement placement_;
  std::unique_ptr<Memory> memory_;
  std::unordered_map<std::string, int> index_;
};

}  // namespace stroma::engine
