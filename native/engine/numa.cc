#include "engine/numa.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <fstream>

namespace stroma::engine::numa {
namespace {

// Of <linux/mempolicy.h>, which not every machine that builds has.
constexpr int kPreferred = 1, kInterleave = 3;
constexpr unsigned long kNodeOfAddress = 1 | 2;  // MPOL_F_NODE | MPOL_F_ADDR
constexpr int kMost = 1024;                      // nodes that a kernel can be built for
constexpr int kWord = 8 * sizeof(unsigned long);

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

bool set_policy(void* data, size_t bytes, int mode, const std::vector<int>& nodes) {
  std::array<unsigned long, kMost / kWord> mask{};
  for (const int node : nodes) {
    if (node < 0 || node >= kMost) return false;
    mask[node / kWord] |= 1UL << (node % kWord);
  }
  // The kernel takes one bit less than it is told.
  return ::syscall(SYS_mbind, data, bytes, mode, mask.data(), static_cast<unsigned long>(kMost + 1), 0u) == 0;
}

}  // namespace

// "0-1,4"
std::vector<int> nodes(const std::string& sys) {
  const std::string list = first_line(sys + "/devices/system/node/has_memory");
  std::vector<int> all;
  for (size_t at = 0; at < list.size();) {
    const size_t comma = std::min(list.find(',', at), list.size());
    int from = 0, to = 0;
    const std::string part = list.substr(at, comma - at);
    const int read = std::sscanf(part.c_str(), "%d-%d", &from, &to);
    if (read < 1 || from < 0) return {};
    for (int node = from; node <= (read == 2 ? std::min(to, kMost) : from); ++node) all.push_back(node);
    at = comma + 1;
  }
  return all;
}

int node_of(const std::string& bus_address, const std::string& sys) {
  const std::vector<int> all = nodes(sys);
  if (all.size() < 2) return -1;
  std::string address = bus_address;  // CUDA writes hexadecimal letters large, the kernel small
  std::transform(address.begin(), address.end(), address.begin(), [](unsigned char c) { return std::tolower(c); });
  const std::string told = first_line(sys + "/bus/pci/devices/" + address + "/numa_node");
  int node = -1;
  if (std::sscanf(told.c_str(), "%d", &node) != 1) return -1;
  return std::find(all.begin(), all.end(), node) == all.end() ? -1 : node;
}

bool prefer(void* data, size_t bytes, int node) { return set_policy(data, bytes, kPreferred, {node}); }

bool interleave(void* data, size_t bytes, const std::vector<int>& nodes) {
  return !nodes.empty() && set_policy(data, bytes, kInterleave, nodes);
}

int node_at(void* data) {
  int node = -1;
  return ::syscall(SYS_get_mempolicy, &node, nullptr, 0UL, data, kNodeOfAddress) == 0 ? node : -1;
}

}  // namespace stroma::engine::numa
