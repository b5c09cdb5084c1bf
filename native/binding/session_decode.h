// JavaScript's Graph, Tape and requests (src/graph/types.ts, src/plan/types.ts, src/train/native-session.ts) into the
// engine's structures. Everything is checked here, where the user can be wrong: errors name the path of the value.
#pragma once
#include <napi.h>

#include "engine/executor.h"
#include "engine/state_file.h"

namespace stroma {

engine::Graph decode_graph(const Napi::Value& value);
std::shared_ptr<const engine::Tape> decode_tape(const Napi::Value& value);
engine::Placement decode_placement(const Napi::Value& value, const std::string& where);
// By loss term; undefined: empty.
std::map<std::string, int64_t> decode_counts(const Napi::Value& value);
engine::Batch decode_batch(const Napi::Value& value, const std::string& where);
std::vector<engine::FileEntry> decode_entries(const Napi::Value& value);
std::vector<engine::StateKind> decode_kinds(const Napi::Value& value);

// Typed fields of an object; `where` names the object in errors.
class Fields {
 public:
  Fields(const Napi::Value& value, std::string where);
  Napi::Value at(const char* name) const;
  std::string path(const char* name) const { return where_ + "." + name; }
  bool has(const char* name) const;
  std::string text(const char* name) const;
  double number(const char* name) const;
  int64_t integer(const char* name) const;
  bool flag(const char* name) const;
  Napi::Array array(const char* name) const;
  std::vector<int> integers(const char* name) const;

 private:
  Napi::Object object_;
  std::string where_;
};

}  // namespace stroma
