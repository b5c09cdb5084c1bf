#include "nvml.h"

#include <dlfcn.h>

namespace stroma::probe {
namespace {

// The few declarations of NVML's stable C interface that are used, after its public reference manual.
using Device = void*;
using Status = int;  // 0: success
struct MemoryInfo {
  unsigned long long total, free, used;
};
constexpr unsigned kNameBytes = 96;     // NVML_DEVICE_NAME_V2_BUFFER_SIZE
constexpr unsigned kVersionBytes = 80;  // NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE
constexpr unsigned kUuidBytes = 96;     // NVML_DEVICE_UUID_V2_BUFFER_SIZE

template <typename Function>
Function symbol(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

Gpus read_gpus() {
  Gpus result;
  void* library = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* text = dlerror();
    result.error = text == nullptr ? "libnvidia-ml.so.1 is missing" : text;
    return result;
  }
  const auto init = symbol<Status (*)()>(library, "nvmlInit_v2");
  const auto shutdown = symbol<Status (*)()>(library, "nvmlShutdown");
  const auto describe = symbol<const char* (*)(Status)>(library, "nvmlErrorString");
  const auto driver = symbol<Status (*)(char*, unsigned)>(library, "nvmlSystemGetDriverVersion");
  const auto cuda = symbol<Status (*)(int*)>(library, "nvmlSystemGetCudaDriverVersion_v2");
  const auto count = symbol<Status (*)(unsigned*)>(library, "nvmlDeviceGetCount_v2");
  const auto handle = symbol<Status (*)(unsigned, Device*)>(library, "nvmlDeviceGetHandleByIndex_v2");
  const auto name = symbol<Status (*)(Device, char*, unsigned)>(library, "nvmlDeviceGetName");
  const auto uuid = symbol<Status (*)(Device, char*, unsigned)>(library, "nvmlDeviceGetUUID");
  const auto memory = symbol<Status (*)(Device, MemoryInfo*)>(library, "nvmlDeviceGetMemoryInfo");
  const auto capability = symbol<Status (*)(Device, int*, int*)>(library, "nvmlDeviceGetCudaComputeCapability");
  const auto explain = [&](Status status) {
    return describe != nullptr ? std::string(describe(status)) : "NVML status " + std::to_string(status);
  };
  if (init == nullptr || shutdown == nullptr || count == nullptr || handle == nullptr) {
    result.error = "libnvidia-ml.so.1 lacks the functions of NVML 5 and later";
    dlclose(library);
    return result;
  }
  if (const Status status = init(); status != 0) {
    result.error = explain(status);
    dlclose(library);
    return result;
  }
  char text[kNameBytes + kVersionBytes] = {};
  if (driver != nullptr && driver(text, kVersionBytes) == 0) result.driver = text;
  if (int version = 0; cuda != nullptr && cuda(&version) == 0) {
    result.cuda = std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
  }
  unsigned devices = 0;
  if (const Status status = count(&devices); status != 0) {
    result.error = explain(status);
    devices = 0;
  }
  for (unsigned index = 0; index < devices; ++index) {
    Device device = nullptr;
    if (handle(index, &device) != 0) continue;  // a card that fell off the bus, or that this user may not see
    Gpu gpu;
    gpu.index = index;
    if (name != nullptr && name(device, text, kNameBytes) == 0) gpu.name = text;
    if (uuid != nullptr && uuid(device, text, kUuidBytes) == 0) gpu.uuid = text;
    if (MemoryInfo info = {}; memory != nullptr && memory(device, &info) == 0) {
      gpu.memory_bytes = info.total;
      gpu.free_bytes = info.free;
    }
    if (int major = 0, minor = 0; capability != nullptr && capability(device, &major, &minor) == 0) {
      gpu.compute_capability = std::to_string(major) + "." + std::to_string(minor);
    }
    result.gpus.push_back(gpu);
  }
  if (result.gpus.empty() && result.error.empty()) result.error = "the driver shows no GPU";
  shutdown();
  dlclose(library);
  return result;
}

}  // namespace stroma::probe
