// A block's program made ready to run: operators resolved, arguments in schema order, values freed after their last
// use.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <map>

#include "engine/graph.h"

namespace stroma::engine {

class Keeper;

class Program {
 public:
  // groups: the process groups that the graph's symbols stand for, by symbol; every rank's own has another name.
  // Throws GRAPH naming program, node and argument when an operator is unknown or an argument does not fit its schema.
  Program(const ProgramSpec& spec, at::Device device, const std::map<std::string, std::string>& groups = {});

  // values: size spec().values, inputs and parameters filled in; filled with the outputs at return, the rest released.
  // keeper: keeps results of its calls, or has some that need not be computed again; null: neither.
  void run(std::vector<at::Tensor>& values, const DimTable& table, const DimValues& dims,
           Keeper* keeper = nullptr) const;

  const ProgramSpec& spec() const { return spec_; }

 private:
  struct Slot {
    enum class Kind : uint8_t { kConstant, kValue, kTensors, kOptionalTensors, kDim, kDims } kind;
    c10::IValue constant;
    int value = -1;
    std::vector<int> values;
    std::vector<Expression> dims;
  };
  struct Node {
    c10::OperatorHandle op;
    std::vector<Slot> slots;
    std::vector<int> outputs;
    std::vector<int> releases;  // values whose last use this is
  };
  Slot bind(const c10::Argument& schema, const Argument& argument, const std::map<std::string, std::string>& groups,
            const std::string& where) const;

  ProgramSpec spec_;
  std::vector<Node> nodes_;
};

}  // namespace stroma::engine
