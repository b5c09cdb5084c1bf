#include "engine/memory.h"

#include <ATen/Functions.h>
#include <ATen/Parallel.h>

#include <cstring>

#include "engine/cuda_device.h"
#include "engine/error.h"
#include "engine/layout.h"

namespace stroma::engine {
namespace {

// From 64 KiB on the allocator maps pages of its own: arenas begin on one.
at::Tensor arena(int64_t bytes) {
  if (bytes == 0) return at::empty({0}, at::kByte);
  return at::empty({std::max<int64_t>(round_up(bytes, kPage), 64 << 10)}, at::kByte);
}

}  // namespace

Memory::Memory(const Placement& placement, at::Device device, Account& account, const std::string& disk_folder,
               at::Tensor shared)
    : on_(device), shared_(std::move(shared)) {
  try {
    if (on_.is_cpu()) {
      const AccountScope scope(account);
      device_ = arena(placement.device_bytes);
    } else {
      device_ = at::empty({placement.device_bytes}, at::TensorOptions().dtype(at::kByte).device(on_));
    }
    host_ = on_.is_cpu() ? arena(placement.host_bytes) : cuda::pinned_bytes(placement.host_bytes);
  } catch (const c10::OutOfMemoryError& error) {
    fail("OUT_OF_MEMORY", "[plan] ", placement.device_bytes, " bytes on the device and ", placement.host_bytes,
         " on the host were planned: ", error.what_without_backtrace(), ". Plan for less memory");
  }
  if (placement.disk_bytes > 0) {
    if (disk_folder.empty())
      fail("CONFIG", "[session] the plan places ", placement.disk_bytes, " bytes on disk, and no diskFolder was given");
    disk_ = std::make_unique<Disk>(disk_folder, placement.disk_bytes);
  }
}

void Memory::check(const Place& place, const char* what) const {
  const int64_t end = place.space == Space::kDevice   ? device_bytes()
                      : place.space == Space::kHost   ? host_bytes()
                      : place.space == Space::kShared ? shared_bytes()
                      : place.space == Space::kDisk   ? disk_bytes()
                                                      : INT64_MAX;
  if (place.offset < 0 || place.bytes < 0 || place.offset > end - place.bytes)
    fail("TAPE", "[tape] ", what, " lies at ", place.offset, " to ", place.offset + place.bytes, " of an arena of ",
         end, " bytes. Load the session with this plan's placement");
}

char* Memory::address(const Place& place) const {
  const at::Tensor& arena = place.space == Space::kDevice ? device_ : place.space == Space::kShared ? shared_ : host_;
  return static_cast<char*>(arena.mutable_data_ptr()) + place.offset;
}

at::Tensor Memory::view(const Place& place, int64_t offset_bytes, at::IntArrayRef sizes, at::ScalarType dtype) const {
  const int64_t bytes = c10::multiply_integers(sizes) * static_cast<int64_t>(c10::elementSize(dtype));
  if (place.space == Space::kDisk || place.space == Space::kSlot || offset_bytes + bytes > place.bytes)
    fail("TAPE", "[tape] a tensor of ", bytes, " bytes at ", offset_bytes, " does not fit its place of ", place.bytes);
  const at::Device where = place.space == Space::kDevice ? on_ : at::Device(at::kCPU);
  // The device is told: else a card's driver would be asked for each view.
  return at::for_blob(address(place) + offset_bytes, sizes)
      .options(at::TensorOptions().dtype(dtype).device(where))
      .target_device(where)
      .make_tensor();
}

void Memory::access(const Place& place, int64_t offset_bytes, void* data, int64_t bytes, bool write) const {
  if (place.space == Space::kDisk) {
    disk().access(place.offset + offset_bytes, data, bytes, write);
    return;
  }
  char* at = address(place) + offset_bytes;
  if (place.space == Space::kDevice && !on_.is_cpu()) {
    cuda::transfer(on_, write ? at : data, write ? data : at, bytes);
    return;
  }
  std::memcpy(write ? at : data, write ? data : at, static_cast<size_t>(bytes));
}

void Memory::zero(const Place& place) const {
  if (place.space == Space::kDisk)
    disk().zero(place.offset, place.bytes);
  else if (place.space == Space::kDevice && !on_.is_cpu())
    cuda::zero(on_, address(place), place.bytes);
  else
    at::parallel_for(0, place.bytes, 16 << 20, [data = address(place)](int64_t from, int64_t to) {
      std::memset(data + from, 0, static_cast<size_t>(to - from));
    });
}

Disk& Memory::disk() const {
  if (!disk_) fail("TAPE", "[tape] a place on disk, and this session has none");
  return *disk_;
}

}  // namespace stroma::engine
