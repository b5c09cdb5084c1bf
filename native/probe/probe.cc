// stroma_probe.node: what this machine is. No libtorch and no header packages beyond node_api.h, so that it builds and
// loads wherever there is a compiler. probe(root?) returns the ProbeReport of src/native.ts; `root` is for tests.
#include <gnu/libc-version.h>
#include <node_api.h>
#include <sched.h>
#include <sys/resource.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <optional>
#include <string>

#include "limits.h"
#include "nvml.h"

namespace {
using stroma::probe::Gpu;

// A thin writer: any failing call leaves a pending exception in `env`, which Node raises on return.
class Writer {
 public:
  explicit Writer(napi_env env) : env_(env) {}

  napi_value null() const {
    napi_value value = nullptr;
    napi_get_null(env_, &value);
    return value;
  }
  napi_value object() const {
    napi_value value = nullptr;
    napi_create_object(env_, &value);
    return value;
  }
  napi_value array() const {
    napi_value value = nullptr;
    napi_create_array(env_, &value);
    return value;
  }
  napi_value make(double number) const {
    napi_value value = nullptr;
    napi_create_double(env_, number, &value);
    return value;
  }
  napi_value make(uint64_t number) const { return make(static_cast<double>(number)); }
  napi_value make(bool flag) const {
    napi_value value = nullptr;
    napi_get_boolean(env_, flag, &value);
    return value;
  }
  napi_value make(const std::string& text) const {
    napi_value value = nullptr;
    napi_create_string_utf8(env_, text.data(), text.size(), &value);
    return value;
  }
  template <typename T>
  napi_value make(const std::optional<T>& value) const {
    return value ? make(*value) : null();
  }
  void set(napi_value target, const char* key, napi_value value) const {
    napi_set_named_property(env_, target, key, value);
  }

 private:
  napi_env env_;
};

struct CpuFlags {
  bool avx2 = false, avx512f = false, avx512_bf16 = false, amx_bf16 = false;
};

CpuFlags read_cpu_flags() {
  CpuFlags flags;
#if defined(__x86_64__)
  // The processor's own word is not enough: the kernel must save the wide registers too, which XGETBV tells.
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & bit_OSXSAVE) == 0) return flags;
  unsigned saved = 0, saved_high = 0;
  __asm__ volatile("xgetbv" : "=a"(saved), "=d"(saved_high) : "c"(0));
  const bool ymm = (saved & 0x6) == 0x6;
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;
  const bool tiles = (saved & 0x60000) == 0x60000;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return flags;
  const unsigned deepest = a;
  flags.avx2 = ymm && (b & (1u << 5)) != 0;
  flags.avx512f = zmm && (b & (1u << 16)) != 0;
  flags.amx_bf16 = tiles && (d & (1u << 22)) != 0;
  if (deepest >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0) flags.avx512_bf16 = zmm && (a & (1u << 5)) != 0;
#endif
  return flags;
}

std::optional<uint64_t> limit(rlim_t value) {
  return value == RLIM_INFINITY ? std::nullopt : std::optional<uint64_t>(value);
}

uint64_t affinity_cpus() {
  // A fixed set holds 1,024 processors; on a larger machine the call fails and the count of online ones stands in.
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) == 0) return static_cast<uint64_t>(CPU_COUNT(&set));
  return static_cast<uint64_t>(sysconf(_SC_NPROCESSORS_ONLN));
}

std::string root_argument(napi_env env, napi_callback_info info) {
  size_t count = 1;
  napi_value argument = nullptr;
  napi_get_cb_info(env, info, &count, &argument, nullptr, nullptr);
  size_t length = 0;
  if (count == 0 || napi_get_value_string_utf8(env, argument, nullptr, 0, &length) != napi_ok) return "";
  std::string root(length, '\0');
  napi_get_value_string_utf8(env, argument, root.data(), length + 1, &length);
  return root;
}

napi_value report(napi_env env, const std::string& root) {
  const Writer write(env);
  napi_value result = write.object();

  const auto found = stroma::probe::read_gpus();
  napi_value gpus = write.array();
  for (size_t i = 0; i < found.gpus.size(); ++i) {
    const Gpu& gpu = found.gpus[i];
    napi_value item = write.object();
    write.set(item, "index", write.make(uint64_t{gpu.index}));
    write.set(item, "name", write.make(gpu.name));
    if (!gpu.uuid.empty()) write.set(item, "uuid", write.make(gpu.uuid));
    write.set(item, "memoryBytes", write.make(gpu.memory_bytes));
    write.set(item, "freeBytes", write.make(gpu.free_bytes));
    write.set(item, "computeCapability", write.make(gpu.compute_capability));
    napi_set_element(env, gpus, static_cast<uint32_t>(i), item);
  }
  write.set(result, "gpus", gpus);
  napi_value driver = write.null();
  if (!found.driver.empty()) {
    driver = write.object();
    write.set(driver, "version", write.make(found.driver));
    write.set(driver, "cuda", write.make(found.cuda));
  }
  write.set(result, "driver", driver);
  write.set(result, "nvmlError", found.error.empty() ? write.null() : write.make(found.error));

  const auto memory = stroma::probe::read_memory(root);
  napi_value memory_object = write.object();
  write.set(memory_object, "totalBytes", write.make(memory.total_bytes));
  write.set(memory_object, "availableBytes", write.make(memory.available_bytes));
  write.set(memory_object, "cgroupBytes", write.make(memory.cgroup_bytes));
  write.set(result, "memory", memory_object);

  napi_value cpus = write.object();
  write.set(cpus, "online", write.make(static_cast<uint64_t>(sysconf(_SC_NPROCESSORS_ONLN))));
  write.set(cpus, "affinity", write.make(affinity_cpus()));
  write.set(cpus, "cgroup", write.make(stroma::probe::read_cgroup_cpus(root)));
  write.set(result, "cpus", cpus);

  rlimit lock = {};
  getrlimit(RLIMIT_MEMLOCK, &lock);
  napi_value memlock = write.object();
  write.set(memlock, "softBytes", write.make(limit(lock.rlim_cur)));
  write.set(memlock, "hardBytes", write.make(limit(lock.rlim_max)));
  write.set(result, "memlock", memlock);

  const CpuFlags flags = read_cpu_flags();
  napi_value cpu_flags = write.object();
  write.set(cpu_flags, "avx2", write.make(flags.avx2));
  write.set(cpu_flags, "avx512f", write.make(flags.avx512f));
  write.set(cpu_flags, "avx512Bf16", write.make(flags.avx512_bf16));
  write.set(cpu_flags, "amxBf16", write.make(flags.amx_bf16));
  write.set(result, "cpuFlags", cpu_flags);

  const auto pages = stroma::probe::read_huge_pages(root);
  napi_value huge_pages = write.object();
  write.set(huge_pages, "transparent", write.make(pages.transparent));
  write.set(huge_pages, "sizeBytes", write.make(pages.size_bytes));
  write.set(result, "hugePages", huge_pages);

  write.set(result, "glibc", write.make(std::string(gnu_get_libc_version())));
  return result;
}

napi_value probe(napi_env env, napi_callback_info info) {
  try {
    return report(env, root_argument(env, info));
  } catch (const std::exception& error) {
    napi_throw_error(env, "NATIVE", error.what());
    return nullptr;
  }
}

}  // namespace

NAPI_MODULE_INIT() {
  napi_value function = nullptr;
  napi_create_function(env, "probe", NAPI_AUTO_LENGTH, probe, nullptr, &function);
  napi_set_named_property(env, exports, "probe", function);
  return exports;
}
