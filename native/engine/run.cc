// Runs without a tape: a forward of an attached graph (evaluation, generation) over the trained parameters. With ranks
// each block runs where most of its parameters are; what others need of it, or of a tied parameter, is sent as it
// comes.
#include <ATen/Functions.h>

#include <map>

#include "engine/error.h"
#include "engine/executor.h"
#include "engine/step.h"

namespace stroma::engine {

// Of a stage, the member that does what this rank does.
int Executor::rank_of_owner(int owner) const {
  const std::optional<Stages>& stages = state_->placement().stages;
  if (!stages.has_value()) return spec_.ranks ? spec_.ranks->spec().rank : 0;
  return stages->counterpart(stages->of[owner]);
}

// By block of a graph that shares the trained one's parameters: the rank that runs it, which is the one with most of
// its parameters (the last, if several have as much); others lend it theirs. A block without any runs where its first
// input comes from.
std::vector<int> Executor::ranks_of_blocks(const LoadedGraph& loaded) const {
  const std::optional<Stages>& among = state_->placement().stages;
  const int self = spec_.ranks ? spec_.ranks->spec().rank : 0;
  std::vector<int> rank_of(loaded.graph.blocks.size(), among.has_value() ? among->counterpart(0) : self);
  if (!among.has_value()) return rank_of;
  for (size_t b = 0; b < rank_of.size(); ++b) {
    if (!loaded.parameters[b].empty()) {
      std::map<int, int64_t> elements;
      for (const int index : loaded.parameters[b]) {
        const ParameterSpec& p = state_->parameters[index].spec;
        elements[rank_of_owner(p.owner)] += c10::multiply_integers(p.shape);
      }
      int64_t most = -1;
      for (const auto& [rank, n] : elements)
        if (n >= most) {
          most = n;
          rank_of[b] = rank;
        }
      continue;
    }
    for (const Source& source : loaded.graph.blocks[b].inputs)
      if (source.block >= 0) {
        rank_of[b] = rank_of.at(source.block);
        break;
      }
  }
  return rank_of;
}

// By block: the ranks that read what it gives, other than its own.
std::vector<std::vector<char>> Executor::readers(const LoadedGraph& loaded, const std::vector<int>& rank_of) const {
  const size_t ranks = spec_.ranks ? static_cast<size_t>(spec_.ranks->spec().size) : 1;
  const Graph& graph = loaded.graph;
  std::vector<std::vector<char>> read(graph.blocks.size(), std::vector<char>(ranks, 0));
  const std::optional<Stages>& stages = state_->placement().stages;
  if (!stages.has_value()) return read;
  for (size_t b = 0; b < graph.blocks.size(); ++b)
    for (const Source& source : graph.blocks[b].inputs)
      if (source.block >= 0) read.at(source.block)[rank_of[b]] = 1;
  for (const GraphOutput& output : graph.outputs)
    for (size_t r = 0; r < ranks; ++r)
      if (static_cast<int>(r) % stages->members() == stages->member()) read.at(output.block)[r] = 1;
  for (size_t b = 0; b < graph.blocks.size(); ++b) read[b][rank_of[b]] = 0;
  return read;
}

// A parameter in the graph's dtype, for a run without a tape: to and from the rank that runs a block which uses it.
void Executor::lend(const at::Tensor& parameter, int to) const {
  const at::Tensor value = parameter.to(at::kCPU).contiguous().view({-1});
  if (value.numel() > 0) spec_.ranks->send(Ranks::Channel::kEngine, value.view(at::kByte), to);
}
at::Tensor Executor::borrow(const Parameter& parameter, int from) const {
  const at::Tensor value = at::empty(parameter.spec.shape, at::dtype(spec_.dtype));
  if (value.numel() > 0) spec_.ranks->receive(Ranks::Channel::kEngine, value.view({-1}).view(at::kByte), from);
  return value.to(spec_.device);
}

// A block's outputs from the rank that ran it to those that read them; shapes go before.
void Executor::share(std::vector<at::Tensor>& outputs, const std::vector<char>& readers, int from) const {
  Ranks& ranks = *spec_.ranks;
  constexpr int64_t kMostDims = 13;
  const auto channel = Ranks::Channel::kEngine;
  const int self = ranks.spec().rank;
  if (self == from) {
    for (size_t r = 0; r < readers.size(); ++r) {
      if (!readers[r]) continue;
      for (const at::Tensor& output : outputs) {
        const at::Tensor value = output.detach().to(at::kCPU).contiguous();
        std::vector<int64_t> header(kMostDims + 2, 0);
        header[0] = static_cast<int64_t>(value.scalar_type());
        header[1] = value.dim();
        for (int64_t d = 0; d < value.dim() && d < kMostDims; ++d) header[2 + d] = value.size(d);
        ranks.send(channel, at::tensor(header, at::kLong).view(at::kByte), static_cast<int>(r));
        if (value.numel() > 0) ranks.send(channel, value.view({-1}).view(at::kByte), static_cast<int>(r));
      }
    }
    return;
  }
  if (!readers[self]) return;
  for (at::Tensor& output : outputs) {
    const at::Tensor header = at::empty({(kMostDims + 2) * 8}, at::kByte);
    ranks.receive(channel, header, from);
    const int64_t* h = static_cast<const int64_t*>(header.const_data_ptr());
    if (h[1] < 0 || h[1] > kMostDims) fail("RANKS", "[ranks] rank ", from, " sent a tensor of no sense");
    const at::Tensor value =
        at::empty(at::IntArrayRef(h + 2, static_cast<size_t>(h[1])), at::dtype(static_cast<at::ScalarType>(h[0])));
    if (value.numel() > 0) ranks.receive(channel, value.view({-1}).view(at::kByte), from);
    output = value.to(spec_.device);
  }
}

std::map<std::string, at::Tensor> Executor::run(const std::string& name, const Batch& batch, int64_t seed,
                                                const std::map<std::string, int64_t>& counts) {
  flush();
  const auto found = attached_.find(name);
  if (found == attached_.end()) fail("INVALID_ARGUMENT", "[session] no graph is attached as \"", name, "\"");
  const LoadedGraph& loaded = *found->second;
  const Graph& graph = loaded.graph;
  const DimValues dims = bind(graph, batch, "the batch of \"" + name + "\"");
  const at::NoGradGuard no_grad;
  // Last reader of every block's outputs, so that boundaries go as soon as they may.
  std::vector<int> last(graph.blocks.size(), -1);
  for (size_t b = 0; b < graph.blocks.size(); ++b)
    for (const Source& source : graph.blocks[b].inputs)
      if (source.block >= 0) last[source.block] = static_cast<int>(b);
  for (const GraphOutput& output : graph.outputs) last[output.block] = static_cast<int>(graph.blocks.size());
  // Parameters come in block by block and go after their last user.
  std::vector<at::Tensor> flat(train_->graph.blocks.size());
  std::vector<int> last_use(flat.size(), -1);
  for (size_t b = 0; b < graph.blocks.size(); ++b)
    for (const int owner : loaded.owners[b]) last_use[owner] = static_cast<int>(b);
  meet_sharers();
  const std::vector<int> rank_of = ranks_of_blocks(loaded);
  const auto read = readers(loaded, rank_of);
  const int self = spec_.ranks ? spec_.ranks->spec().rank : 0;
  std::vector<std::vector<at::Tensor>> boundaries(graph.blocks.size());
  const auto parameter_of = [&](int index) {
    const Parameter& p = state_->parameters[index];
    at::Tensor& all = flat[p.spec.owner];
    if (!all.defined()) all = flat_parameters(p.spec.owner);
    return all.narrow(0, p.offset, c10::multiply_integers(p.spec.shape)).view(p.spec.shape);
  };
  const auto used = [&](size_t b) {
    for (const int owner : loaded.owners[b])
      if (last_use[owner] == static_cast<int>(b)) flat[owner].reset();
  };
  Batch moved;
  // By parameter and rank, once: what its owner's rank has lent; here, what came.
  std::map<std::pair<int, int>, at::Tensor> lent;
  for (size_t b = 0; b < graph.blocks.size(); ++b) {
    const BlockSpec& block = graph.blocks[b];
    const auto& specs = loaded.programs[block.program].spec().inputs;
    for (const int index : loaded.parameters[b]) {
      const Parameter& p = state_->parameters[index];
      const int from = rank_of_owner(p.spec.owner), to = rank_of[b];
      if (from == to || (from != self && to != self) || lent.count({index, to}) > 0) continue;
      at::Tensor& came = lent[{index, to}];
      if (from == self)
        lend(parameter_of(index), to);
      else
        came = borrow(p, from);
    }
    if (rank_of[b] != self) {
      boundaries[b].resize(loaded.programs[block.program].spec().outputs.size());
      share(boundaries[b], read[b], rank_of[b]);
      used(b);
      continue;
    }
    std::vector<at::Tensor> inputs;
    for (size_t i = 0; i < specs.size(); ++i) {
      const Source& source = block.inputs[i];
      switch (specs[i].kind) {
        case ProgramInput::Kind::kBoundary:
          if (source.block < 0 || source.block >= static_cast<int>(b) || source.output < 0 ||
              source.output >= static_cast<int>(boundaries[source.block].size()))
            fail("GRAPH", "[graph] block ", block.name, " reads a boundary that no earlier block writes");
          inputs.push_back(boundaries[source.block][source.output]);
          break;
        case ProgramInput::Kind::kBatch: {
          const auto it = batch.find(source.name);
          if (it == batch.end()) fail("INVALID_ARGUMENT", "[session] the batch has no input \"", source.name, "\"");
          // Once: a card waits for each copy of what the host's pages hold.
          const auto [there, fresh] = moved.try_emplace(source.name);
          if (fresh) there->second = it->second.to(spec_.device);
          inputs.push_back(there->second);
          break;
        }
        case ProgramInput::Kind::kLossScale: {
          const LossTerm& term = graph.losses[loss_named(graph, source.name)];
          const int64_t n = counts.empty() ? count(term, batch) : count_given(counts, term);
          inputs.push_back(at::scalar_tensor(n == 0 ? 0.0 : 1.0 / static_cast<double>(n),
                                             at::dtype(specs[i].dtype).device(spec_.device)));
          break;
        }
        case ProgramInput::Kind::kRngKey:
          inputs.push_back(at::tensor(at::ArrayRef<int64_t>({seed, 0, 0, static_cast<int64_t>(b)}), at::kLong));
          break;
      }
    }
    std::vector<at::Tensor> parameters;
    for (const int p : loaded.parameters[b]) {
      const auto came = lent.find({p, self});
      parameters.push_back(came == lent.end() ? parameter_of(p) : came->second);
    }
    boundaries[b] = run_block(loaded, static_cast<int>(b), std::move(inputs), parameters, dims);
    if (spec_.ranks) share(boundaries[b], read[b], self);
    used(b);
    for (size_t e = 0; e <= b; ++e)
      if (last[e] <= static_cast<int>(b) && last[e] >= 0) boundaries[e].clear();
  }
  std::map<std::string, at::Tensor> outputs;
  for (const GraphOutput& output : graph.outputs)
    outputs[output.name] = boundaries.at(output.block).at(output.output).contiguous().to(at::kCPU);
  meet_sharers();
  return outputs;
}

// All parameters that a block owns, in the graph's dtype: its home, or a copy. With shards the ranks that hold them
// call this together.
at::Tensor Executor::flat_parameters(int owner) const {
  const BlockLayout& block = state_->layout[owner];
  if (state_->placement().shards() > 1) {
    at::Tensor whole = at::empty({block.all.size()}, at::dtype(spec_.dtype));
    gather_shards(owner, whole);
    return whole.to(spec_.device);
  }
  const Place& home = *state_->placement().param[owner];
  const at::ScalarType storage = state_->format().storage;
  const int64_t elements = home.bytes / static_cast<int64_t>(c10::elementSize(storage));
  if (home.space != Space::kDisk)
    return state_->memory().view(home, 0, {elements}, storage).to(spec_.device, spec_.dtype);
  const at::Tensor copy = at::empty({elements}, at::dtype(storage));
  state_->memory().access(home, 0, copy.mutable_data_ptr(), home.bytes, /*write=*/false);
  return copy.to(spec_.device, spec_.dtype);
}

}  // namespace stroma::engine
