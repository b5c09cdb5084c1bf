#include "engine/program.h"

#include <ATen/ScalarOps.h>
#include <ATen/core/jit_type.h>

#include "engine/error.h"
#include "engine/kept.h"

namespace stroma::engine {
namespace {

using Kind = Argument::Kind;

bool is_whole(double x) { return x == static_cast<double>(static_cast<int64_t>(x)); }

// A JavaScript number for a schema type; nullopt where it does not fit.
std::optional<c10::IValue> number_for(const c10::TypePtr& type, double x, bool is_float) {
  switch (type->kind()) {
    case c10::TypeKind::IntType:
    case c10::TypeKind::SymIntType:
      if (is_float || !is_whole(x)) return std::nullopt;
      return c10::IValue(static_cast<int64_t>(x));
    case c10::TypeKind::FloatType:
    case c10::TypeKind::SymFloatType:
      return c10::IValue(x);
    case c10::TypeKind::NumberType:
      if (is_float || !is_whole(x)) return c10::IValue(x);
      return c10::IValue(static_cast<int64_t>(x));
    case c10::TypeKind::TensorType: {
      // A number where a tensor stands takes part in type promotion as a number.
      at::Tensor wrapped = is_float || !is_whole(x) ? at::scalar_tensor(x, at::kDouble)
                                                    : at::scalar_tensor(static_cast<int64_t>(x), at::kLong);
      wrapped.unsafeGetTensorImpl()->set_wrapped_number(true);
      return c10::IValue(std::move(wrapped));
    }
    default:
      return std::nullopt;
  }
}

}  // namespace

Program::Slot Program::bind(const c10::Argument& schema, const Argument& argument,
                            const std::map<std::string, std::string>& groups, const std::string& where) const {
  c10::TypePtr type = schema.real_type();
  const bool optional = type->kind() == c10::TypeKind::OptionalType;
  if (optional) type = type->expectRef<c10::OptionalType>().getElementType();
  const auto refuse = [&]() -> Slot {
    fail("GRAPH", "[graph] expected ", schema.real_type()->str(), " for argument ", schema.name(), ", at ", where);
  };
  const auto constant = [](c10::IValue value) { return Slot{Slot::Kind::kConstant, std::move(value), -1, {}, {}}; };
  const auto check_value = [&](int id) {
    if (id < 0 || id >= spec_.values) fail("GRAPH", "[graph] value ", id, " does not exist, at ", where);
  };
  const bool is_list = type->kind() == c10::TypeKind::ListType;
  const c10::TypePtr element = is_list ? type->expectRef<c10::ListType>().getElementType() : nullptr;
  switch (argument.kind) {
    case Kind::kNull:
      if (!optional && type->kind() != c10::TypeKind::NoneType) return refuse();
      return constant(c10::IValue());
    case Kind::kValue:
      if (type->kind() != c10::TypeKind::TensorType) return refuse();
      check_value(argument.value);
      return Slot{Slot::Kind::kValue, {}, argument.value, {}, {}};
    case Kind::kValues: {
      if (!is_list) return refuse();
      const bool holes = element->kind() == c10::TypeKind::OptionalType;
      if (!holes && element->kind() != c10::TypeKind::TensorType) return refuse();
      for (const int id : argument.values)
        if (id != -1 || !holes) check_value(id);
      return Slot{holes ? Slot::Kind::kOptionalTensors : Slot::Kind::kTensors, {}, -1, argument.values, {}};
    }
    case Kind::kDim:
      if (number_for(type, 1, false) == std::nullopt) return refuse();
      return Slot{Slot::Kind::kDim, {}, -1, {}, argument.dims};
    case Kind::kDims:
      if (!is_list || (element->kind() != c10::TypeKind::IntType && element->kind() != c10::TypeKind::SymIntType))
        return refuse();
      return Slot{Slot::Kind::kDims, {}, -1, {}, argument.dims};
    case Kind::kBool:
      if (type->kind() == c10::TypeKind::BoolType || type->kind() == c10::TypeKind::NumberType)
        return constant(c10::IValue(argument.number != 0));
      return refuse();
    case Kind::kNumber:
    case Kind::kFloat: {
      if (is_list) {  // int[1] from a bare int
        const auto one = number_for(element, argument.number, argument.kind == Kind::kFloat);
        if (!one.has_value() || !one->isInt()) return refuse();
        return constant(c10::IValue(c10::List<int64_t>({one->toInt()})));
      }
      auto value = number_for(type, argument.number, argument.kind == Kind::kFloat);
      if (!value.has_value()) return refuse();
      return constant(std::move(*value));
    }
    case Kind::kString:
      if (type->kind() != c10::TypeKind::StringType) return refuse();
      if (schema.name() == "group") {
        const auto found = groups.find(argument.text);
        if (found == groups.end())
          fail("GRAPH", "[graph] this session has no group of ranks \"", argument.text, "\"",
               groups.empty() ? "" : " but \"" + groups.begin()->first + "\"",
               ": give it options.context of as many ranks, at ", where);
        return constant(c10::IValue(found->second));
      }
      return constant(c10::IValue(argument.text));
    case Kind::kDType:
      if (schema.real_type()->str().find("ScalarType") == std::string::npos) return refuse();
      return constant(c10::IValue(static_cast<int64_t>(argument.dtype)));
    case Kind::kBools: {
      if (!is_list || element->kind() != c10::TypeKind::BoolType) return refuse();
      c10::List<bool> list;
      for (const double b : argument.numbers) list.push_back(b != 0);
      return constant(c10::IValue(std::move(list)));
    }
    case Kind::kNumbers: {
      if (!is_list) return refuse();
      if (element->kind() == c10::TypeKind::FloatType) {
        c10::List<double> list;
        for (const double x : argument.numbers) list.push_back(x);
        return constant(c10::IValue(std::move(list)));
      }
      c10::List<int64_t> list;
      for (const double x : argument.numbers) {
        if (!is_whole(x)) return refuse();
        list.push_back(static_cast<int64_t>(x));
      }
      return constant(c10::IValue(std::move(list)));
    }
  }
  return refuse();
}

Program::Program(const ProgramSpec& spec, at::Device device, const std::map<std::string, std::string>& groups)
    : spec_(spec) {
  auto& dispatcher = c10::Dispatcher::singleton();
  for (size_t n = 0; n < spec_.nodes.size(); ++n) {
    const NodeSpec& node = spec_.nodes[n];
    const std::string where = "node " + std::to_string(n) + " (" + node.op + ") of program " + spec_.name;
    // "namespace::name.overload"
    const size_t colons = node.op.find("::");
    const size_t dot = colons == std::string::npos ? std::string::npos : node.op.find('.', colons + 2);
    const std::string name = node.op.substr(0, dot);
    const std::string overload = dot == std::string::npos ? "" : node.op.substr(dot + 1);
    const auto op = dispatcher.findSchema({name, overload});
    if (!op.has_value()) fail("GRAPH", "[graph] the dispatcher has no operator ", node.op, ", at ", where);
    const auto& schema = op->schema();
    const auto& arguments = schema.arguments();
    if (node.args.size() > arguments.size())
      fail("GRAPH", "[graph] expected at most ", arguments.size(), " arguments, got ", node.args.size(), ", at ",
           where);
    if (node.outputs.size() > schema.returns().size())
      fail("GRAPH", "[graph] expected at most ", schema.returns().size(), " outputs, got ", node.outputs.size(),
           ", at ", where);
    Node ready{*op, {}, node.outputs, {}};
    for (const auto& [key, unused] : node.kwargs)
      if (!schema.argumentIndexWithName(key).has_value())
        fail("GRAPH", "[graph] ", node.op, " has no argument ", key, ", at ", where);
    bool has_tensor = false;
    for (size_t i = 0; i < arguments.size(); ++i) {
      const Argument* given = i < node.args.size() ? &node.args[i] : nullptr;
      for (const auto& [key, value] : node.kwargs)
        if (key == arguments[i].name()) given = &value;
      if (given != nullptr) {
        ready.slots.push_back(bind(arguments[i], *given, groups, where));
        has_tensor = has_tensor || given->kind == Kind::kValue || given->kind == Kind::kValues;
      } else if (arguments[i].name() == "device" && !has_tensor) {
        // A factory makes its tensor where the block runs.
        ready.slots.push_back({Slot::Kind::kConstant, c10::IValue(device), -1, {}, {}});
      } else if (arguments[i].default_value().has_value()) {
        ready.slots.push_back({Slot::Kind::kConstant, *arguments[i].default_value(), -1, {}, {}});
      } else if (arguments[i].type()->kind() == c10::TypeKind::OptionalType) {
        ready.slots.push_back({Slot::Kind::kConstant, c10::IValue(), -1, {}, {}});
      } else {
        fail("GRAPH", "[graph] argument ", arguments[i].name(), " of ", node.op, " is missing, at ", where);
      }
    }
    for (const int id : node.outputs)
      if (id >= spec_.values) fail("GRAPH", "[graph] value ", id, " does not exist, at ", where);
    nodes_.push_back(std::move(ready));
  }
  // Release each value after its last reader; what no node reads goes at once unless it is an output.
  std::vector<char> wanted(spec_.values, 0);
  for (const auto& output : spec_.outputs) {
    if (output.value < 0 || output.value >= spec_.values)
      fail("GRAPH", "[graph] output ", output.name, " of program ", spec_.name, " is no value");
    wanted[output.value] = 1;
  }
  for (size_t n = nodes_.size(); n-- > 0;) {
    Node& node = nodes_[n];
    const auto last = [&](int id) {
      if (id >= 0 && !wanted[id]) {
        wanted[id] = 1;
        node.releases.push_back(id);
      }
    };
    for (const int id : node.outputs) last(id);
    for (const Slot& slot : node.slots) {
      last(slot.value);
      for (const int id : slot.values) last(id);
    }
  }
}

void Program::run(std::vector<at::Tensor>& values, const DimTable& table, const DimValues& dims, Keeper* keeper) const {
  torch::jit::Stack stack;
  for (size_t n = 0; n < nodes_.size(); ++n) {
    const Node& node = nodes_[n];
    for (const Slot& slot : node.slots) {
      switch (slot.kind) {
        case Slot::Kind::kConstant:
          stack.push_back(slot.constant);
          break;
        case Slot::Kind::kValue:
          stack.emplace_back(values[slot.value]);
          break;
        case Slot::Kind::kTensors: {
          c10::List<at::Tensor> list;
          for (const int id : slot.values) list.push_back(values[id]);
          stack.emplace_back(std::move(list));
          break;
        }
        case Slot::Kind::kOptionalTensors: {
          c10::List<std::optional<at::Tensor>> list;
          for (const int id : slot.values)
            list.push_back(id < 0 ? std::optional<at::Tensor>() : std::optional<at::Tensor>(values[id]));
          stack.emplace_back(std::move(list));
          break;
        }
        case Slot::Kind::kDim:
          stack.emplace_back(slot.dims[0].evaluate(table, dims));
          break;
        case Slot::Kind::kDims: {
          c10::List<int64_t> list;
          for (const Expression& dim : slot.dims) list.push_back(dim.evaluate(table, dims));
          stack.emplace_back(std::move(list));
          break;
        }
      }
    }
    if (keeper != nullptr) keeper->begin(n);
    node.op.callBoxed(stack);
    if (keeper != nullptr) keeper->end(n, stack.front().toTensor());
    for (size_t i = 0; i < node.outputs.size(); ++i)
      if (node.outputs[i] >= 0) values[node.outputs[i]] = std::move(stack[i]).toTensor();
    stack.clear();
    if (keeper != nullptr)
      for (const int id : node.outputs)
        if (id >= 0) values[id] = keeper->cut(std::move(values[id]));
    for (const int id : node.releases) values[id].reset();
  }
}

}  // namespace stroma::engine
