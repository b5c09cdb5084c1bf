// Where cards sit in their machine, and the host memory beside them. No arithmetic.
#include <sys/mman.h>

#include "binding/exports.h"
#include "binding/lane.h"
#include "engine/cuda_device.h"
#include "engine/layout.h"
#include "engine/numa.h"

namespace stroma {
namespace {

namespace numa = engine::numa;

Napi::Value bus_address(const Napi::CallbackInfo& info) {
  if (info.Length() < 1 || !info[0].IsNumber())
    throw CodedError("INVALID_ARGUMENT", "[cuda] expected the number of a card");
  const auto index = static_cast<c10::DeviceIndex>(info[0].As<Napi::Number>().Int32Value());
  return Napi::String::New(info.Env(), engine::cuda::bus_address(at::Device(at::kCUDA, index)));
}

// The node that a page comes from which is asked of `node`; -1 where asking is refused.
int node_given(int node) {
  const auto size = static_cast<size_t>(engine::kPage);
  void* page = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return -1;
  int given = -1;
  if (numa::prefer(page, size, node)) {
    *static_cast<volatile char*>(page) = 1;
    given = numa::node_at(page);
  }
  ::munmap(page, size);
  return given;
}

// memoryNodes(address, sys = "/sys") -> {nodes, near, given}
Napi::Value memory_nodes(const Napi::CallbackInfo& info) {
  if (info.Length() < 1 || !info[0].IsString())
    throw CodedError("INVALID_ARGUMENT", "[cuda] expected the address of a card");
  const std::string sys = info.Length() > 1 && info[1].IsString() ? info[1].As<Napi::String>().Utf8Value() : "/sys";
  const std::vector<int> nodes = numa::nodes(sys);
  const int near = numa::node_of(info[0].As<Napi::String>().Utf8Value(), sys);
  const int given = nodes.empty() ? -1 : node_given(near >= 0 ? near : nodes.front());
  Napi::Object result = Napi::Object::New(info.Env());
  Napi::Array list = Napi::Array::New(info.Env(), nodes.size());
  for (uint32_t i = 0; i < nodes.size(); ++i) list.Set(i, nodes[i]);
  const auto set = [&](const char* name, int node) {
    result.Set(name, node < 0 ? info.Env().Null() : Napi::Value(Napi::Number::New(info.Env(), node)));
  };
  result.Set("nodes", list);
  set("near", near);
  set("given", given);
  return result;
}

}  // namespace

void export_machine(Napi::Env env, Napi::Object exports) {
  const auto set = [&](const char* name, Napi::Value (*body)(const Napi::CallbackInfo&)) {
    exports.Set(name, Napi::Function::New(env, [body](const Napi::CallbackInfo& info) -> Napi::Value {
                  return entry(info, [&]() -> Napi::Value { return body(info); });
                }));
  };
  set("busAddress", bus_address);
  set("memoryNodes", memory_nodes);
}

}  // namespace stroma
