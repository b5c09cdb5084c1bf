// Elements that a thread loads and stores at once: what 16 bytes hold, or one where rows begin elsewhere.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels/hd.h"

namespace stroma {

template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T at[N];
};

template <int N, typename T>
__device__ __forceinline__ Pack<T, N> load_pack(const T* __restrict__ from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, typename T>
__device__ __forceinline__ void store_pack(T* __restrict__ to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Calls work(std::integral_constant<int, N>): N elements of 16 bytes where all pointers and rows of `bytes` allow it.
template <typename T, typename Work>
void by_packs(std::initializer_list<const void*> pointers, int64_t bytes, const Work& work) {
  bool whole = bytes % 16 == 0;
  for (const void* p : pointers) whole = whole && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  if (whole)
    work(std::integral_constant<int, 16 / sizeof(T)>{});
  else
    work(std::integral_constant<int, 1>{});
}

}  // namespace stroma
