// Memory nodes: on a machine of several sockets a card reads the memory of its own socket faster than that of another.
// Placement is a wish. Where there is one node, none is told, or the system refuses (containers often do: mbind asks
// for SYS_NICE there), pages come from wherever they would have come from.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace stroma::engine::numa {

// The nodes that have memory; empty where the system does not tell. sys: for tests, a tree like /sys.
std::vector<int> nodes(const std::string& sys = "/sys");
// The node of a PCI device ("0000:65:00.0"); -1 where none is told or the machine has no more than one.
int node_of(const std::string& bus_address, const std::string& sys = "/sys");

// Of whole pages that nothing has touched yet: from `node` while it has room, or in turns from all of `nodes` (what
// cards of several sockets read alike). False where it is refused.
bool prefer(void* data, size_t bytes, int node);
bool interleave(void* data, size_t bytes, const std::vector<int>& nodes);
// The node of a page that was touched; -1 where it is not told.
int node_at(void* data);

}  // namespace stroma::engine::numa
