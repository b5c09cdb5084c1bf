// The graph and the tape as the engine holds them: src/graph/types.ts and src/plan/types.ts in C++.
#pragma once
#include <c10/core/ScalarType.h>

#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "engine/expression.h"

namespace stroma::engine {

struct Argument {
  enum class Kind { kValue, kValues, kDim, kDims, kNull, kBool, kNumber, kFloat, kString, kNumbers, kBools, kDType };
  Kind kind = Kind::kNull;
  int value = -1;
  std::vector<int> values;  // -1: a null in a Tensor?[]
  std::vector<Expression> dims;
  double number = 0;
  std::string text;
  std::vector<double> numbers;
  at::ScalarType dtype = at::kFloat;
};

struct NodeSpec {
  std::string op;
  std::vector<Argument> args;
  std::vector<std::pair<std::string, Argument>> kwargs;
  std::vector<int> outputs;  // -1: not used
};

struct ProgramInput {
  enum class Kind { kBoundary, kBatch, kLossScale, kRngKey };
  std::string name;
  Kind kind;
  at::ScalarType dtype;
  bool grad;
};

struct ProgramOutput {
  std::string name;
  int value;
  bool grad;
  std::vector<Expression> shape;
};

struct ProgramSpec {
  std::string name;
  std::vector<ProgramInput> inputs;
  std::vector<std::string> parameters;
  std::vector<NodeSpec> nodes;
  std::vector<ProgramOutput> outputs;
  int values;
};

struct Source {
  int block = -1, output = -1;
  std::string name;  // batch input or loss term
};

struct BlockSpec {
  std::string name;
  int program;
  std::vector<Source> inputs;
  std::vector<int> parameters;  // into Graph.parameters
};

struct Init {
  enum class Kind { kNormal, kUniform, kZeros, kOnes } kind;
  double a = 0, b = 0;  // std; or low, high
};

struct ParameterSpec {
  std::string name;
  std::vector<int64_t> shape;
  Init init;
  bool decay, trainable;
  int owner;
};

struct BatchInput {
  std::string name;
  at::ScalarType dtype;
  std::vector<Expression> shape;
};

struct LossTerm {
  std::string name;
  int block, output;
  double weight;
  std::string count_input;
  int64_t count_ignore;
};

struct GraphOutput {
  std::string name;
  int block, output;
};

struct Graph {
  std::string mode;
  DimTable dims;
  std::vector<BatchInput> inputs;
  std::vector<ProgramSpec> programs;
  std::vector<BlockSpec> blocks;
  std::vector<ParameterSpec> parameters;
  std::vector<LossTerm> losses;
  std::vector<GraphOutput> outputs;
};

// kShared: host memory that the ranks of a replica have in common.
enum class Space : uint8_t { kDevice, kHost, kShared, kDisk, kSlot };

struct Place {
  Space space = Space::kDevice;
  int64_t offset = 0, bytes = 0;
};

enum class MasterWeight : uint8_t { kNone, kSplit16, kFloat32 };
enum class RetainedDType : uint8_t { kFloat32, kFloat64, kBFloat16, kDynamic8 };
enum class Clip : uint8_t { kNone, kBlock, kGlobal };
enum class UpdateOrder : uint8_t { kEnd, kBackward, kForward };
enum class CopyQueue : uint8_t { kIn, kOut, kLoad, kSave, kSend, kReceive };
constexpr int kCopyQueues = 6;

// How parameters and optimizer state are stored.
struct StateFormat {
  at::ScalarType storage = at::kFloat;
  MasterWeight master = MasterWeight::kNone;
  bool eight_bit = false;
  bool operator==(const StateFormat&) const = default;
};

// Blocks, micro-batches and rows over ranks. A stage's members run the same blocks and add up their gradients; each
// `context` of them, neighbours, share the rows of micro-batches that are theirs alone; state is cut over `shards` of
// them. rank = (stage * replicas + replica) * shards + shard.
struct Stages {
  int rank = 0, ranks = 1;
  std::vector<int> of;  // by block: its stage
  int shards = 1, replicas = 1, context = 1;
  bool shared_host = false;  // ranks of a replica read parameters from host memory that they share
  int members() const { return shards * replicas; }
  int stage() const { return rank / members(); }
  int member() const { return rank % members(); }
  int shard() const { return rank % shards; }
  int replica() const { return member() / shards; }
  // A member of this rank's stage; the member of another stage that runs the same micro-batches as this one.
  int peer(int member) const { return stage() * members() + member; }
  int counterpart(int stage) const { return stage * members() + member(); }
  bool is_mine(size_t block) const { return of[block] == stage(); }
  bool runs(int micro_batch, int by) const { return micro_batch % (members() / context) == by % members() / context; }
  bool runs(int micro_batch) const { return runs(micro_batch, rank); }
  // The ranks of this one's replica, by shard.
  std::vector<int> replica_group() const {
    std::vector<int> group;
    for (int shard = 0; shard < shards; ++shard) group.push_back(peer(replica() * shards + shard));
    return group;
  }
  // The ranks that share rows with this one, in the order of their shares.
  std::vector<int> context_group() const {
    std::vector<int> group;
    for (int place = 0; place < context; ++place) group.push_back(rank / context * context + place);
    return group;
  }
  bool operator==(const Stages&) const = default;
};

// Where the state of every block lives between steps.
struct Placement {
  int64_t device_bytes = 0, host_bytes = 0, disk_bytes = 0, shared_bytes = 0;
  std::vector<std::optional<Place>> param, state;  // by block; with shards: of this rank's
  // By block: where the parts of all shards lie one behind the other, each of whole pages; `param` is one of them.
  std::vector<std::optional<Place>> shared;
  std::optional<Stages> stages;  // none: this rank holds and runs all
  bool is_mine(size_t block) const { return !stages.has_value() || stages->is_mine(block); }
  bool runs(int micro_batch) const { return !stages.has_value() || stages->runs(micro_batch); }
  int members() const { return stages.has_value() ? stages->members() : 1; }
  int shards() const { return stages.has_value() ? stages->shards : 1; }
};

// Fields by op as in src/plan/types.ts; operands are indices into Tape::places, -1 where there is none.
struct Instruction {
  enum class Op : uint8_t {
    kForward,
    kTurn,
    kBackward,
    kCast,
    kNorm,
    kPartial,
    kReduce,
    kReport,
    kAgree,
    kCoefficient,
    kPack,
    kUpdate,
    kCopy,
    kSend,
    kReceive
  } op;
  // Whether it runs on a queue beside compute.
  bool queued() const { return op == Op::kCopy || op == Op::kSend || op == Op::kReceive; }
  bool keep = false, first = false;
  int block = -1, micro_batch = -1;
  std::vector<int> params, in, out, d_out, d_in;
  std::vector<char> add;
  std::vector<int> sums;  // of a pass: one; of norm, pack and update: by user (update from retained: the retained
                          // place); with shards of those: what is reduced; of partial: by user; of reduce: its parts
  int from = -1, to = -1;
  int param = -1, state = -1;
  bool retained = false;
  RetainedDType dtype = RetainedDType::kFloat32;
  CopyQueue queue = CopyQueue::kIn;
  int peer = -1;  // of send (from) and receive (to)
  int64_t at = 0, bytes = 0;
  std::vector<int> waits;
  // The queue that it waits its turn on: one for each direction and peer, or one peer would hold up another.
  int line() const { return op == Op::kCopy ? static_cast<int>(queue) : kLines + 2 * peer + (op == Op::kReceive); }
  static constexpr int kLines = 4;
  static constexpr int lines(int ranks) { return kLines + 2 * ranks; }
};

// Recompute "selective": ids of values by program, and for a graph's operators those below autograd that do their work.
struct KeptValues {
  std::vector<std::vector<int>> values, shapes;
  std::vector<std::pair<std::string, std::vector<std::string>>> kernels;
};

struct Tape {
  bool flush = false;
  UpdateOrder update = UpdateOrder::kEnd;
  Clip clip = Clip::kGlobal;
  StateFormat format;
  int micro_batches = 0, slots = 0;
  Placement placement;
  std::vector<Place> places;
  std::vector<Instruction> instructions;
  bool has_copies = false;  // or anything else that is queued
  std::optional<KeptValues> kept;
};

}  // namespace stroma::engine
