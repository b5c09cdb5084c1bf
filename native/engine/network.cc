#include "engine/network.h"

#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "engine/error.h"

namespace stroma::engine {
namespace {

// A socket that listens, or -1 with errno set.
int listening(const sockaddr* at, socklen_t length) {
  const int fd = socket(at->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  const int yes = 1, no = 0;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (at->sa_family == AF_INET6) setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &no, sizeof no);
  if (bind(fd, at, length) == 0 && listen(fd, 1024) == 0) return fd;
  const int error = errno;
  close(fd);
  errno = error;
  return -1;
}

// Nothing is sent: connecting a datagram socket only chooses a way.
std::string way_to(const addrinfo& there) {
  std::string own;
  sockaddr_storage at{};
  socklen_t length = sizeof at;
  char text[NI_MAXHOST];
  const int fd = socket(there.ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd >= 0 && connect(fd, there.ai_addr, there.ai_addrlen) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&at), &length) == 0 &&
      getnameinfo(reinterpret_cast<sockaddr*>(&at), length, text, sizeof text, nullptr, 0, NI_NUMERICHOST) == 0)
    own = text;
  if (fd >= 0) close(fd);
  return own;
}

}  // namespace

std::string host_name() {
  char name[256] = {0};
  gethostname(name, sizeof name - 1);
  return name;
}

bool is_loopback(const std::string& address) {
  return address == "localhost" || address == "::1" || address.rfind("127.", 0) == 0;
}

std::string way_to(const std::string& address) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_DGRAM;
  if (getaddrinfo(address.c_str(), "9", &hints, &found) != 0) return {};
  std::string own;
  for (const addrinfo* at = found; at != nullptr && own.empty(); at = at->ai_next) own = way_to(*at);
  freeaddrinfo(found);
  return own;
}

int listen_at(const std::string& address, int port) {
  sockaddr_in6 six{};
  six.sin6_family = AF_INET6;
  six.sin6_port = htons(static_cast<uint16_t>(port));
  six.sin6_addr = address == "::1" ? in6addr_loopback : in6addr_any;
  sockaddr_in four{};
  four.sin_family = AF_INET;
  four.sin_port = six.sin6_port;
  four.sin_addr.s_addr = htonl(is_loopback(address) ? INADDR_LOOPBACK : INADDR_ANY);
  const bool only_four = is_loopback(address) && address != "::1";
  int fd = only_four ? -1 : listening(reinterpret_cast<sockaddr*>(&six), sizeof six);
  // A machine may have no IPv6 at all.
  if (only_four || (fd < 0 && address != "::1" && (errno == EAFNOSUPPORT || errno == EADDRNOTAVAIL)))
    fd = listening(reinterpret_cast<sockaddr*>(&four), sizeof four);
  if (fd < 0)
    fail("RANKS", "[ranks] rank 0 cannot listen at ", address, ":", port, ": ", std::strerror(errno),
         ". Give another port");
  return fd;
}

}  // namespace stroma::engine
