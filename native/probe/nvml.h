// NVIDIA GPUs and driver through libnvidia-ml.so.1, opened at run time: the driver brings it, and nothing is linked.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace stroma::probe {

struct Gpu {
  unsigned index = 0;
  std::string name, uuid;
  uint64_t memory_bytes = 0;
  uint64_t free_bytes = 0;
  std::string compute_capability;  // "9.0"; empty where the driver does not say
};

struct Gpus {
  std::vector<Gpu> gpus;
  std::string driver;  // "580.82.07"; empty: no driver
  std::string cuda;    // the newest CUDA that the driver runs, "13.0"
  std::string error;   // why there are no GPUs; empty when there are
};

// All cards that the driver shows, whatever CUDA_VISIBLE_DEVICES says.
Gpus read_gpus();

}  // namespace stroma::probe
