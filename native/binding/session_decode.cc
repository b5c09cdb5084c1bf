#include "binding/session_decode.h"

#include <cmath>

#include "binding/errors.h"
#include "binding/host_tensor.h"

namespace stroma {
namespace {

[[noreturn]] void refuse(const std::string& where, const std::string& expected) {
  throw CodedError("INVALID_ARGUMENT", "[session] expected " + expected + ", at " + where);
}

double number_of(const Napi::Value& value, const std::string& where) {
  if (!value.IsNumber()) refuse(where, "a number");
  return value.As<Napi::Number>().DoubleValue();
}

int64_t integer_of(const Napi::Value& value, const std::string& where) {
  const double x = number_of(value, where);
  if (x != std::floor(x) || std::abs(x) > 9007199254740991.0) refuse(where, "a safe integer");
  return static_cast<int64_t>(x);
}

std::string text_of(const Napi::Value& value, const std::string& where) {
  if (!value.IsString()) refuse(where, "a string");
  return value.As<Napi::String>().Utf8Value();
}

Napi::Array array_of(const Napi::Value& value, const std::string& where) {
  if (!value.IsArray()) refuse(where, "an array");
  return value.As<Napi::Array>();
}

template <class F>
auto map_array(const Napi::Array& array, const std::string& where, F&& f) {
  std::vector<decltype(f(Napi::Value(), std::string()))> result;
  for (uint32_t i = 0; i < array.Length(); ++i) {
    const Napi::HandleScope scope(array.Env());
    result.push_back(f(array.Get(i), where + "[" + std::to_string(i) + "]"));
  }
  return result;
}

engine::Expression decode_dim(const Napi::Value& value, const std::string& where, engine::DimTable& dims) {
  if (value.IsString()) return engine::Expression::parse(value.As<Napi::String>().Utf8Value(), dims);
  return engine::Expression(integer_of(value, where));
}

std::vector<engine::Expression> decode_dims(const Napi::Value& value, const std::string& where,
                                            engine::DimTable& dims) {
  return map_array(array_of(value, where), where,
                   [&](const Napi::Value& v, const std::string& at) { return decode_dim(v, at, dims); });
}

engine::Argument decode_argument(const Napi::Value& value, const std::string& where, engine::DimTable& dims) {
  using Kind = engine::Argument::Kind;
  const Fields fields(value, where);
  engine::Argument result;
  if (fields.has("value")) {
    result.kind = Kind::kValue;
    result.value = static_cast<int>(fields.integer("value"));
  } else if (fields.has("values")) {
    result.kind = Kind::kValues;
    result.values = map_array(fields.array("values"), fields.path("values"), [](const Napi::Value& v, const auto& at) {
      return v.IsNull() ? -1 : static_cast<int>(integer_of(v, at));
    });
  } else if (fields.has("dim")) {
    result.kind = Kind::kDim;
    result.dims.push_back(decode_dim(fields.at("dim"), fields.path("dim"), dims));
  } else if (fields.has("dims")) {
    result.kind = Kind::kDims;
    result.dims = decode_dims(fields.at("dims"), fields.path("dims"), dims);
  } else if (fields.has("float")) {
    result.kind = Kind::kFloat;
    result.number = fields.number("float");
  } else if (fields.has("dtype")) {
    result.kind = Kind::kDType;
    result.dtype = dtype_from_name(fields.text("dtype"));
  } else if (fields.has("constant")) {
    const Napi::Value constant = fields.at("constant");
    const std::string at = fields.path("constant");
    if (constant.IsNull()) {
      result.kind = Kind::kNull;
    } else if (constant.IsBoolean()) {
      result.kind = Kind::kBool;
      result.number = constant.As<Napi::Boolean>().Value() ? 1 : 0;
    } else if (constant.IsNumber()) {
      result.kind = Kind::kNumber;
      result.number = constant.As<Napi::Number>().DoubleValue();
    } else if (constant.IsString()) {
      result.kind = Kind::kString;
      result.text = constant.As<Napi::String>().Utf8Value();
    } else {
      const Napi::Array list = array_of(constant, at);
      const bool bools = list.Length() > 0 && list.Get(0u).IsBoolean();
      result.kind = bools ? Kind::kBools : Kind::kNumbers;
      result.numbers = map_array(list, at, [&](const Napi::Value& v, const std::string& path) {
        return bools ? static_cast<double>(v.ToBoolean().Value()) : number_of(v, path);
      });
    }
  } else {
    refuse(where, "an argument: value, values, dim, dims, constant, float or dtype");
  }
  return result;
}

engine::NodeSpec decode_node(const Napi::Value& value, const std::string& where, engine::DimTable& dims) {
  const Fields fields(value, where);
  engine::NodeSpec node;
  node.op = fields.text("op");
  node.args = map_array(fields.array("args"), fields.path("args"),
                        [&](const Napi::Value& v, const std::string& at) { return decode_argument(v, at, dims); });
  if (fields.has("kwargs")) {
    if (!fields.at("kwargs").IsObject()) refuse(fields.path("kwargs"), "an object");
    const Napi::Object kwargs = fields.at("kwargs").As<Napi::Object>();
    const Napi::Array names = kwargs.GetPropertyNames();
    for (uint32_t i = 0; i < names.Length(); ++i) {
      const std::string name = names.Get(i).ToString().Utf8Value();
      node.kwargs.emplace_back(name, decode_argument(kwargs.Get(name), where + ".kwargs." + name, dims));
    }
  }
  node.outputs = map_array(fields.array("outputs"), fields.path("outputs"), [](const Napi::Value& v, const auto& at) {
    return v.IsNull() ? -1 : static_cast<int>(integer_of(v, at));
  });
  return node;
}

engine::ProgramInput decode_program_input(const Napi::Value& value, const std::string& where) {
  using Kind = engine::ProgramInput::Kind;
  const Fields fields(value, where);
  const std::string kind = fields.text("kind");
  engine::ProgramInput input{fields.text("name"), Kind::kBatch, dtype_from_name(fields.text("dtype")),
                             fields.flag("grad")};
  if (kind == "boundary")
    input.kind = Kind::kBoundary;
  else if (kind == "lossScale")
    input.kind = Kind::kLossScale;
  else if (kind == "rngKey")
    input.kind = Kind::kRngKey;
  else if (kind != "batch")
    refuse(fields.path("kind"), "boundary, batch, lossScale or rngKey");
  return input;
}

engine::ProgramSpec decode_program(const Napi::Value& value, const std::string& where, engine::DimTable& dims) {
  const Fields fields(value, where);
  engine::ProgramSpec program;
  program.name = fields.text("name");
  program.inputs = map_array(fields.array("inputs"), fields.path("inputs"), decode_program_input);
  program.parameters =
      map_array(fields.array("parameters"), fields.path("parameters"),
                [](const Napi::Value& v, const std::string& at) { return Fields(v, at).text("name"); });
  program.nodes = map_array(fields.array("nodes"), fields.path("nodes"),
                            [&](const Napi::Value& v, const auto& at) { return decode_node(v, at, dims); });
  program.outputs =
      map_array(fields.array("outputs"), fields.path("outputs"), [&](const Napi::Value& v, const auto& at) {
        const Fields f(v, at);
        return engine::ProgramOutput{f.text("name"), static_cast<int>(f.integer("value")), f.flag("grad"),
                                     decode_dims(f.at("shape"), f.path("shape"), dims)};
      });
  program.values = static_cast<int>(fields.integer("values"));
  const size_t fixed = program.inputs.size() + program.parameters.size();
  if (program.values < 0 || static_cast<size_t>(program.values) < fixed || program.values > (1 << 24))
    refuse(fields.path("values"), "a count of values that holds inputs and parameters");
  return program;
}

engine::Init decode_init(const Napi::Value& value, const std::string& where) {
  using Kind = engine::Init::Kind;
  const Fields fields(value, where);
  const std::string kind = fields.text("kind");
  if (kind == "normal") return {Kind::kNormal, fields.number("std"), 0};
  if (kind == "uniform") return {Kind::kUniform, fields.number("low"), fields.number("high")};
  if (kind == "zeros") return {Kind::kZeros};
  if (kind == "ones") return {Kind::kOnes};
  refuse(fields.path("kind"), "normal, uniform, zeros or ones");
}

}  // namespace

Fields::Fields(const Napi::Value& value, std::string where) : where_(std::move(where)) {
  if (!value.IsObject()) refuse(where_, "an object");
  object_ = value.As<Napi::Object>();
}
Napi::Value Fields::at(const char* name) const { return object_.Get(name); }
bool Fields::has(const char* name) const { return !object_.Get(name).IsUndefined(); }
std::string Fields::text(const char* name) const { return text_of(at(name), path(name)); }
double Fields::number(const char* name) const { return number_of(at(name), path(name)); }
int64_t Fields::integer(const char* name) const { return integer_of(at(name), path(name)); }
bool Fields::flag(const char* name) const {
  const Napi::Value value = at(name);
  if (!value.IsBoolean()) refuse(path(name), "true or false");
  return value.As<Napi::Boolean>().Value();
}
Napi::Array Fields::array(const char* name) const { return array_of(at(name), path(name)); }
std::vector<int> Fields::integers(const char* name) const {
  return map_array(array(name), path(name),
                   [](const Napi::Value& v, const std::string& at) { return static_cast<int>(integer_of(v, at)); });
}

engine::Graph decode_graph(const Napi::Value& value) {
  const Fields fields(value, "graph");
  if (fields.text("format") != "stromatolite.graph" || fields.integer("version") != 1)
    throw CodedError("VERSION_MISMATCH", "[session] expected a stromatolite.graph of version 1");
  engine::Graph graph;
  graph.mode = fields.text("mode");
  graph.inputs = map_array(fields.array("inputs"), "graph.inputs", [&](const Napi::Value& v, const std::string& at) {
    const Fields f(v, at);
    return engine::BatchInput{f.text("name"), dtype_from_name(f.text("dtype")),
                              decode_dims(f.at("shape"), f.path("shape"), graph.dims)};
  });
  graph.programs = map_array(fields.array("programs"), "graph.programs",
                             [&](const Napi::Value& v, const auto& at) { return decode_program(v, at, graph.dims); });
  std::unordered_map<std::string, int> by_name;
  graph.parameters =
      map_array(fields.array("parameters"), "graph.parameters", [&](const Napi::Value& v, const auto& at) {
        const Fields f(v, at);
        engine::ParameterSpec spec{f.text("name"),
                                   {},
                                   decode_init(f.at("init"), f.path("init")),
                                   f.flag("decay"),
                                   f.flag("trainable"),
                                   static_cast<int>(f.integer("owner"))};
        spec.shape = map_array(f.array("shape"), f.path("shape"), integer_of);
        if (!by_name.emplace(spec.name, static_cast<int>(by_name.size())).second)
          refuse(at, "parameter names that differ (" + spec.name + " stands twice)");
        return spec;
      });
  const int blocks = static_cast<int>(fields.array("blocks").Length());
  for (const auto& p : graph.parameters)
    if (p.owner < 0 || p.owner >= blocks) refuse("graph.parameters", "an owner among the blocks of " + p.name);
  graph.blocks = map_array(fields.array("blocks"), "graph.blocks", [&](const Napi::Value& v, const std::string& at) {
    const Fields f(v, at);
    engine::BlockSpec block{f.text("name"), static_cast<int>(f.integer("program")), {}, {}};
    block.inputs = map_array(f.array("inputs"), f.path("inputs"), [&](const Napi::Value& source, const auto& where) {
      const Fields s(source, where);
      engine::Source result;
      if (s.has("block")) {
        result.block = static_cast<int>(s.integer("block"));
        result.output = static_cast<int>(s.integer("output"));
      } else if (s.has("batch")) {
        result.name = s.text("batch");
      } else if (s.has("lossScale")) {
        result.name = s.text("lossScale");
      } else if (!s.has("rngKey")) {
        refuse(where, "a source: block and output, batch, lossScale or rngKey");
      }
      return result;
    });
    block.parameters =
        map_array(f.array("parameters"), f.path("parameters"), [&](const Napi::Value& p, const auto& where) {
          const auto it = by_name.find(text_of(p, where));
          if (it == by_name.end()) refuse(where, "the name of a parameter of the graph");
          return it->second;
        });
    return block;
  });
  const auto check_output = [&](int block, int output, const std::string& at) {
    if (block < 0 || block >= blocks || output < 0) refuse(at, "an output of a block");
    const int program = graph.blocks[block].program;
    if (program < 0 || program >= static_cast<int>(graph.programs.size()) ||
        output >= static_cast<int>(graph.programs[program].outputs.size()))
      refuse(at, "an output of block " + graph.blocks[block].name);
  };
  graph.losses = map_array(fields.array("losses"), "graph.losses", [&](const Napi::Value& v, const std::string& at) {
    const Fields f(v, at);
    const Fields count(f.at("count"), f.path("count"));
    engine::LossTerm term{f.text("name"),
                          static_cast<int>(f.integer("block")),
                          static_cast<int>(f.integer("output")),
                          f.number("weight"),
                          count.text("input"),
                          count.integer("ignore")};
    check_output(term.block, term.output, at);
    return term;
  });
  graph.outputs = map_array(fields.array("outputs"), "graph.outputs", [&](const Napi::Value& v, const std::string& at) {
    const Fields f(v, at);
    engine::GraphOutput output{f.text("name"), static_cast<int>(f.integer("block")),
                               static_cast<int>(f.integer("output"))};
    check_output(output.block, output.output, at);
    return output;
  });
  return graph;
}

namespace {

template <class T>
T choice(const Fields& fields, const char* name, std::initializer_list<std::pair<const char*, T>> options) {
  const std::string text = fields.text(name);
  std::string all;
  for (const auto& [key, value] : options) {
    if (text == key) return value;
    all += (all.empty() ? "" : ", ") + std::string(key);
  }
  refuse(fields.path(name), "one of " + all);
}

engine::Place decode_place(const Napi::Value& value, const std::string& where) {
  using engine::Space;
  const Fields f(value, where);
  return {choice<Space>(f, "space",
                        {{"device", Space::kDevice},
                         {"host", Space::kHost},
                         {"shared", Space::kShared},
                         {"disk", Space::kDisk},
                         {"slot", Space::kSlot}}),
          f.integer("offset"), f.integer("bytes")};
}

engine::RetainedDType decode_retained(const Fields& fields, const char* name) {
  using engine::RetainedDType;
  return choice<RetainedDType>(fields, name,
                               {{"float32", RetainedDType::kFloat32},
                                {"float64", RetainedDType::kFloat64},
                                {"bfloat16", RetainedDType::kBFloat16},
                                {"dynamic8", RetainedDType::kDynamic8}});
}

engine::Instruction decode_instruction(const Napi::Value& value, const std::string& where) {
  using Op = engine::Instruction::Op;
  using engine::CopyQueue;
  const Fields f(value, where);
  engine::Instruction result{};
  result.op = choice<Op>(f, "op",
                         {{"forward", Op::kForward},
                          {"turn", Op::kTurn},
                          {"backward", Op::kBackward},
                          {"cast", Op::kCast},
                          {"norm", Op::kNorm},
                          {"partial", Op::kPartial},
                          {"reduce", Op::kReduce},
                          {"report", Op::kReport},
                          {"agree", Op::kAgree},
                          {"coefficient", Op::kCoefficient},
                          {"pack", Op::kPack},
                          {"update", Op::kUpdate},
                          {"copy", Op::kCopy},
                          {"send", Op::kSend},
                          {"receive", Op::kReceive}});
  const auto integer = [&f](const char* name) { return static_cast<int>(f.integer(name)); };
  result.waits = f.integers("waits");
  if (result.op == Op::kCopy) {
    result.queue = choice<CopyQueue>(
        f, "queue",
        {{"in", CopyQueue::kIn}, {"out", CopyQueue::kOut}, {"load", CopyQueue::kLoad}, {"save", CopyQueue::kSave}});
    result.from = integer("from");
    result.to = integer("to");
    result.at = f.integer("at");
    result.bytes = f.integer("bytes");
    return result;
  }
  if (result.op == Op::kSend || result.op == Op::kReceive) {
    const bool sends = result.op == Op::kSend;
    result.queue = sends ? CopyQueue::kSend : CopyQueue::kReceive;
    result.peer = integer("peer");
    (sends ? result.from : result.to) = integer("place");
    result.bytes = f.integer("bytes");
    return result;
  }
  if (result.op == Op::kCoefficient || result.op == Op::kReport || result.op == Op::kAgree) return result;
  result.block = integer("block");
  const bool passes = result.op == Op::kForward || result.op == Op::kTurn || result.op == Op::kBackward;
  if (passes) {
    result.micro_batch = integer("microBatch");
    result.params = f.integers("params");
    result.in = f.integers("in");
  }
  switch (result.op) {
    case Op::kForward:
      result.out = f.integers("out");
      result.keep = f.flag("keep");
      break;
    case Op::kBackward:
      result.d_out = f.integers("dOut");
      [[fallthrough]];
    case Op::kTurn: {
      result.d_in = f.integers("dIn");
      result.first = f.flag("first");
      result.sums = {integer("sums")};
      const Napi::Array add = f.array("add");
      for (uint32_t i = 0; i < add.Length(); ++i) result.add.push_back(add.Get(i).ToBoolean().Value());
      if (result.d_in.size() != result.in.size() || result.add.size() != result.in.size())
        refuse(where, "dIn and add as long as in");
      break;
    }
    case Op::kCast:
      result.from = integer("from");
      result.to = integer("to");
      break;
    case Op::kNorm:
      result.sums = f.integers("sums");
      break;
    case Op::kReduce:
      result.sums = f.integers("parts");
      result.to = integer("to");
      result.dtype = decode_retained(f, "dtype");
      break;
    case Op::kPartial:
    case Op::kPack:
      result.sums = f.integers("sums");
      result.to = integer("to");
      result.dtype = decode_retained(f, "dtype");
      break;
    default:
      result.param = integer("param");
      result.state = integer("state");
      result.sums = f.integers("grad");
      result.retained = choice<bool>(f, "from", {{"sums", false}, {"retained", true}});
      result.dtype = decode_retained(f, "dtype");
  }
  return result;
}

}  // namespace

engine::StateFormat decode_format(const Fields& fields) {
  using engine::MasterWeight;
  return {
      dtype_from_name(fields.text("storage")),
      choice<MasterWeight>(
          fields, "masterWeight",
          {{"none", MasterWeight::kNone}, {"split16", MasterWeight::kSplit16}, {"float32", MasterWeight::kFloat32}}),
      choice<bool>(fields, "optimizer", {{"adamw", false}, {"adamw8bit", true}})};
}

// Absent but for recompute "selective".
std::optional<engine::KeptValues> decode_kept(const Napi::Value& value, const std::string& where) {
  if (value.IsUndefined()) return std::nullopt;
  const Fields fields(value, where);
  engine::KeptValues kept;
  const auto ids = [&](const char* name) {
    return map_array(fields.array(name), fields.path(name), [](const Napi::Value& v, const std::string& at) {
      return map_array(array_of(v, at), at, [](const Napi::Value& id, const std::string& where) {
        return static_cast<int>(integer_of(id, where));
      });
    });
  };
  kept.values = ids("values");
  kept.shapes = ids("shapes");
  if (!fields.at("kernels").IsObject()) refuse(fields.path("kernels"), "an object");
  const Napi::Object kernels = fields.at("kernels").As<Napi::Object>();
  const Napi::Array names = kernels.GetPropertyNames();
  for (uint32_t i = 0; i < names.Length(); ++i) {
    const std::string op = names.Get(i).ToString().Utf8Value(), at = fields.path("kernels") + "." + op;
    kept.kernels.emplace_back(op, map_array(array_of(kernels.Get(op), at), at, text_of));
  }
  return kept;
}

engine::Placement decode_placement(const Napi::Value& value, const std::string& where) {
  const Fields fields(value, where);
  const Fields arenas(fields.at("arenas"), fields.path("arenas"));
  engine::Placement placement;
  placement.device_bytes = arenas.integer("deviceBytes");
  placement.host_bytes = arenas.integer("hostBytes");
  placement.disk_bytes = arenas.integer("diskBytes");
  if (arenas.has("sharedBytes")) placement.shared_bytes = arenas.integer("sharedBytes");
  if (placement.device_bytes < 0 || placement.host_bytes < 0 || placement.disk_bytes < 0 || placement.shared_bytes < 0)
    refuse(fields.path("arenas"), "bytes of at least 0");
  const Napi::Array homes = fields.array("homes");
  for (uint32_t b = 0; b < homes.Length(); ++b) {
    const std::string at = where + ".homes[" + std::to_string(b) + "]";
    const Fields home(homes.Get(b), at);
    const auto place = [&](const char* name) -> std::optional<engine::Place> {
      if (home.at(name).IsNull()) return std::nullopt;
      return decode_place(home.at(name), home.path(name));
    };
    placement.param.push_back(place("param"));
    placement.state.push_back(place("state"));
    placement.shared.push_back(home.has("shared") ? place("shared") : std::nullopt);
  }
  if (fields.has("stages") && !fields.at("stages").IsNull()) {
    const Fields f(fields.at("stages"), fields.path("stages"));
    engine::Stages stages;
    const auto count = [&f](const char* name, int64_t most) {
      if (!f.has(name) || f.at(name).IsUndefined()) return 1;
      const int64_t n = f.integer(name);
      if (n < 1 || n > most) refuse(f.path(name), "1 to " + std::to_string(most));
      return static_cast<int>(n);
    };
    stages.ranks = count("ranks", 1 << 20);
    stages.rank = static_cast<int>(f.integer("rank"));
    if (stages.rank < 0 || stages.rank >= stages.ranks) refuse(f.path("rank"), "one of the ranks");
    stages.shards = count("shards", stages.ranks);
    stages.replicas = count("replicas", stages.ranks / stages.shards);
    if (stages.ranks % stages.members() != 0) refuse(f.path("ranks"), "a multiple of shards x replicas");
    stages.context = count("context", stages.members());
    if (stages.members() % stages.context != 0) refuse(f.path("context"), "a divisor of shards x replicas");
    stages.shared_host = f.has("sharedHost") && f.flag("sharedHost");
    stages.of = f.integers("of");
    if (stages.of.size() != placement.param.size()) refuse(f.path("of"), "a stage for each block");
    for (const int stage : stages.of)
      if (stage < 0 || stage >= stages.ranks / stages.members()) refuse(f.path("of"), "stages that there are");
    placement.stages = std::move(stages);
  }
  return placement;
}

std::shared_ptr<const engine::Tape> decode_tape(const Napi::Value& value) {
  using engine::Clip;
  using engine::UpdateOrder;
  const Fields fields(value, "tape");
  if (fields.text("format") != "stromatolite.tape" || fields.integer("version") != 2)
    throw CodedError("VERSION_MISMATCH", "[session] expected a stromatolite.tape of version 2");
  auto tape = std::make_shared<engine::Tape>();
  tape->flush = choice<bool>(fields, "kind", {{"step", false}, {"flush", true}});
  tape->update = choice<UpdateOrder>(
      fields, "update",
      {{"end", UpdateOrder::kEnd}, {"backward", UpdateOrder::kBackward}, {"forward", UpdateOrder::kForward}});
  tape->clip =
      choice<Clip>(fields, "clip", {{"none", Clip::kNone}, {"block", Clip::kBlock}, {"global", Clip::kGlobal}});
  tape->format = decode_format(Fields(fields.at("state"), "tape.state"));
  tape->placement = decode_placement(fields.at("placement"), "tape.placement");
  tape->micro_batches = static_cast<int>(fields.integer("microBatches"));
  tape->slots = static_cast<int>(fields.integer("slots"));
  if (tape->micro_batches < (tape->flush ? 0 : 1) || tape->slots < 0 || tape->slots > (1 << 24))
    refuse("tape", "micro-batches and slots of a possible number");
  tape->places = map_array(fields.array("places"), "tape.places", decode_place);
  tape->instructions = map_array(fields.array("instructions"), "tape.instructions", decode_instruction);
  for (const auto& i : tape->instructions)
    if (i.queued()) tape->has_copies = true;
  tape->kept = decode_kept(value.As<Napi::Object>().Get("kept"), "tape.kept");
  return tape;
}

std::map<std::string, int64_t> decode_counts(const Napi::Value& value) {
  std::map<std::string, int64_t> counts;
  if (value.IsUndefined()) return counts;
  if (!value.IsObject()) refuse("counts", "an object of numbers");
  const Napi::Object object = value.As<Napi::Object>();
  const Napi::Array names = object.GetPropertyNames();
  for (uint32_t i = 0; i < names.Length(); ++i) {
    const std::string name = names.Get(i).ToString().Utf8Value();
    const int64_t count = integer_of(object.Get(name), "counts." + name);
    if (count < 0) refuse("counts." + name, "a count of at least 0");
    counts.emplace(name, count);
  }
  return counts;
}

engine::Batch decode_batch(const Napi::Value& value, const std::string& where) {
  if (!value.IsObject()) refuse(where, "an object of host tensors");
  const Napi::Object object = value.As<Napi::Object>();
  const Napi::Array names = object.GetPropertyNames();
  engine::Batch batch;
  for (uint32_t i = 0; i < names.Length(); ++i) {
    const std::string name = names.Get(i).ToString().Utf8Value();
    batch.emplace(name, host_tensor_from_js(object.Get(name), where + "." + name));
  }
  return batch;
}

std::vector<engine::FileEntry> decode_entries(const Napi::Value& value) {
  return map_array(array_of(value, "entries"), "entries", [](const Napi::Value& v, const std::string& at) {
    const Fields f(v, at);
    return engine::FileEntry{engine::state_kind_from_name(f.text("kind")), f.text("name"),
                             dtype_from_name(f.text("dtype")), f.integer("offset"), f.integer("bytes")};
  });
}

std::vector<engine::StateKind> decode_kinds(const Napi::Value& value) {
  return map_array(array_of(value, "kinds"), "kinds", [](const Napi::Value& v, const std::string& at) {
    return engine::state_kind_from_name(text_of(v, at));
  });
}

}  // namespace stroma
