// Where the ranks of a run find each other: addresses of this machine, and the socket that the store listens on.
#pragma once
#include <string>

namespace stroma::engine {

std::string host_name();

// Of this machine alone: "localhost", 127.0.0.0/8, ::1.
bool is_loopback(const std::string& address);

// The address that packets to a machine (a name or an address) leave from, as text: by it this machine is reached from
// there. Of a name with several addresses the first counts that there is a way to. Empty: the name is not known, or
// there is no way.
std::string way_to(const std::string& address);

// A listening TCP socket: on the loopback alone where the address is that, else on all interfaces, of IPv6 and IPv4.
// Throws RANKS.
int listen_at(const std::string& address, int port);

}  // namespace stroma::engine
