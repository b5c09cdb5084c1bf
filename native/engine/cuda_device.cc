#include "engine/cuda_device.h"

#include "engine/error.h"

#ifdef STROMA_CUDA

#include <ATen/Context.h>
#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <cstring>

#include "engine/copy_queues.h"
#include "engine/layout.h"
#include "engine/nccl_links.h"
#include "engine/numa.h"
#include "engine/step.h"

namespace stroma::engine::cuda {
namespace {

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();
  fail(status == cudaErrorMemoryAllocation ? "OUT_OF_MEMORY" : "NATIVE", "[cuda] ", what, ": ",
       cudaGetErrorString(status));
}

class Event {
 public:
  explicit Event(bool timing = false) {
    check(cudaEventCreateWithFlags(&event_, timing ? cudaEventDefault : cudaEventDisableTiming), "an event");
  }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;
  cudaEvent_t get() const { return event_; }
  void record(cudaStream_t stream) const { check(cudaEventRecord(event_, stream), "recording an event"); }

 private:
  cudaEvent_t event_ = nullptr;
};

// Every queue but compute has a thread that issues its copies: it first waits until what a copy waits for has been
// issued (disk, ranks: done), then lets the stream wait for the events. So the thread that issues passes never blocks
// on a disk. Every step ends with both directions and the passes done: the next one's events and places are free.
class CudaCopies final : public CopyQueues {
 public:
  CudaCopies(at::Device device, std::shared_ptr<Ranks> ranks, bool over_nccl)
      : CopyQueues(std::move(ranks)), device_(device) {
    if (over_nccl) links_ = nccl::links(device_, ranks_);
    const c10::cuda::CUDAGuard guard(device_);
    for (int direction = 0; direction < 2; ++direction)
      streams_.push_back(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device_.index()));
    // An event is its device's, which is the current one where it is made: another's cannot be recorded here.
    begin_.emplace();
  }
  ~CudaCopies() override { stop(); }

  void begin(const Tape& tape, const Memory& memory, Timeline* timeline) override {
    if (links_) links_->open(tape);
    reset(tape, memory, timeline);
    const c10::cuda::CUDAGuard guard(device_);
    const size_t n = tape.instructions.size();
    // An event only where another queue waits for it.
    wanted_.assign(n, 0);
    for (const Instruction& i : tape.instructions)
      for (const int w : i.waits) wanted_[w] = 1;
    while (events_.size() < n) events_.emplace_back();
    if (timeline != nullptr) {
      starts_.clear();
      ends_.clear();
      for (size_t i = 0; i < n; ++i) {
        starts_.emplace_back(true);
        ends_.emplace_back(true);
      }
      base_.emplace(true);
      base_->record(compute());
      // The clock that host times are of begins where the events' does: nothing is under way.
      check(cudaEventSynchronize(base_->get()), "the begin of a step");
      base_seconds_ = steady_seconds();
    }
    // Copies of this step follow the work that came before it.
    begin_->record(compute());
    for (const auto& stream : streams_) follow(stream.stream(), *begin_);
    start();
  }

  void await(int instruction) override {
    CopyQueues::await(instruction);
    for (const int w : at(instruction).waits)
      if (on_stream(w)) follow(compute(), events_[w]);
    if (timeline_ != nullptr) starts_[instruction].record(compute());
  }

  void finished(int instruction) override {
    if (timeline_ != nullptr) ends_[instruction].record(compute());
    if (wanted_[instruction]) events_[instruction].record(compute());
    CopyQueues::finished(instruction);
  }

  void end(bool abort) override {
    drain(abort);
    for (const auto& stream : streams_) check(cudaStreamSynchronize(stream.stream()), "the copies of a step");
    check(cudaStreamSynchronize(compute()), "the passes of a step");
    if (timeline_ != nullptr && !abort) tell_times();
    settle(abort);
  }

 private:
  cudaStream_t compute() const { return c10::cuda::getCurrentCUDAStream(device_.index()).stream(); }
  static void follow(cudaStream_t stream, const Event& event) {
    check(cudaStreamWaitEvent(stream, event.get(), 0), "a stream's wait");
  }
  bool on_stream(int instruction) const {
    const Instruction& i = at(instruction);
    return !i.queued() || i.queue == CopyQueue::kIn || i.queue == CopyQueue::kOut;
  }
  const Place& place(int index) const { return tape_->places[index]; }
  char* address(int index, const Instruction& copy) const { return memory_->address(place(index)) + copy.at; }

  void carry_out(int instruction) override {
    const c10::cuda::CUDAGuard guard(device_);
    const Instruction& copy = at(instruction);
    if (!on_stream(instruction)) {
      // The host touches these bytes itself: what streams still do to them must be over.
      for (const int w : copy.waits)
        if (on_stream(w)) check(cudaEventSynchronize(events_[w].get()), "waiting for a copy");
      const double start = steady_seconds();
      if (copy.op != Instruction::Op::kCopy)
        links_ && !is_word(*tape_, copy) ? links_->exchange(*tape_, *memory_, copy)
                                         : exchange(*tape_, *memory_, copy, *ranks_);
      else if (copy.queue == CopyQueue::kLoad)
        memory_->disk().read(place(copy.from).offset + copy.at, address(copy.to, copy), copy.bytes);
      else
        memory_->disk().write(place(copy.to).offset + copy.at, address(copy.from, copy), copy.bytes);
      if (timeline_ != nullptr) {
        timeline_->start[instruction] = start;
        timeline_->end[instruction] = steady_seconds();
      }
      return;
    }
    const cudaStream_t stream = streams_[static_cast<int>(copy.queue)].stream();
    for (const int w : copy.waits)
      if (on_stream(w)) follow(stream, events_[w]);
    if (timeline_ != nullptr) starts_[instruction].record(stream);
    check(cudaMemcpyAsync(address(copy.to, copy), address(copy.from, copy), static_cast<size_t>(copy.bytes),
                          cudaMemcpyDefault, stream),
          "a copy");
    if (timeline_ != nullptr) ends_[instruction].record(stream);
    if (wanted_[instruction]) events_[instruction].record(stream);
  }

  void tell_times() {
    const auto seconds = [&](const Event& event) {
      float ms = 0;
      // An instruction that never ran has no event.
      if (cudaEventElapsedTime(&ms, base_->get(), event.get()) != cudaSuccess) {
        cudaGetLastError();
        return 0.0;
      }
      return base_seconds_ + ms / 1e3;
    };
    for (size_t i = 0; i < tape_->instructions.size(); ++i) {
      if (!on_stream(static_cast<int>(i))) continue;
      timeline_->start[i] = seconds(starts_[i]);
      timeline_->end[i] = seconds(ends_[i]);
    }
  }

  const at::Device device_;
  std::vector<c10::cuda::CUDAStream> streams_;  // in, out
  std::vector<Event> events_, starts_, ends_;   // by instruction
  std::optional<Event> base_, begin_;
  double base_seconds_ = 0;
  std::unique_ptr<nccl::Links> links_;  // null: over Gloo
  std::vector<char> wanted_;
};

}  // namespace

bool built() { return true; }

void check_device(at::Device device) {
  const int count = c10::cuda::device_count();
  if (count == 0)
    fail("NOT_SET_UP",
         "[cuda] this build has CUDA, and no card answers. Look at `npx stroma doctor`, or use device \"cpu\"");
  if (device.index() >= count)
    fail("INVALID_ARGUMENT", "[cuda] expected a card below ", count, ", got ", static_cast<int>(device.index()));
}

std::string bus_address(at::Device device) {
  check_device(device);
  char address[64] = {0};
  check(cudaDeviceGetPCIBusId(address, sizeof address, device.index()), "asking where the card sits");
  return address;
}

at::Tensor pinned_bytes(int64_t bytes) {
  if (bytes == 0) return at::empty({0}, at::kByte);
  const auto size = static_cast<size_t>(round_up(bytes, kPage));
  void* data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) fail("OUT_OF_MEMORY", "[cuda] the operating system refused ", size, " bytes of host memory");
  ::madvise(data, size, MADV_HUGEPAGE);
  const int node = numa::node_of(bus_address(at::Device(at::kCUDA, c10::cuda::current_device())));
  if (node >= 0) numa::prefer(data, size, node);
  // Pinning would fault all pages in on one thread: seconds for every ten gigabytes.
  at::parallel_for(0, static_cast<int64_t>(size), 64 << 20, [data](int64_t from, int64_t to) {
    for (int64_t at = from; at < to; at += kPage) static_cast<volatile char*>(data)[at] = 0;
  });
  try {
    pin(data, static_cast<int64_t>(size));
  } catch (const Error&) {
    ::munmap(data, size);
    throw;
  }
  return at::from_blob(
      data, {static_cast<int64_t>(size)},
      [size, device = c10::cuda::current_device()](void* at) {
        // Whoever lets go last may be another thread, whose current device has no context yet and should get none.
        const c10::cuda::CUDAGuard guard(device);
        unpin(at);
        ::munmap(at, size);
      },
      at::TensorOptions().dtype(at::kByte));
}

void pin(void* data, int64_t bytes) {
  const cudaError_t status = cudaHostRegister(data, static_cast<size_t>(bytes), cudaHostRegisterPortable);
  if (status == cudaSuccess) return;
  cudaGetLastError();
  fail("OUT_OF_MEMORY", "[cuda] ", bytes, " bytes of host memory cannot be pinned: ", cudaGetErrorString(status),
       ". Raise the memlock limit (ulimit -l), or plan with less host memory");
}

void unpin(void* data) { cudaHostUnregister(data); }

void transfer(at::Device device, void* to, const void* from, int64_t bytes) {
  const c10::cuda::CUDAGuard guard(device);
  check(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDefault,
                        c10::cuda::getCurrentCUDAStream(device.index()).stream()),
        "a transfer");
  check(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream(device.index()).stream()), "a transfer");
}

void zero(at::Device device, void* data, int64_t bytes) {
  const c10::cuda::CUDAGuard guard(device);
  const cudaStream_t stream = c10::cuda::getCurrentCUDAStream(device.index()).stream();
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), stream), "zeroing");
  // Threads that read a checkpoint into the state do not wait for this stream.
  check(cudaStreamSynchronize(stream), "zeroing");
}

int64_t open(at::Device device, std::optional<int64_t> bytes) {
  check_device(device);
  // The allocator has no devices before.
  at::globalContext().lazyInitDevice(at::kCUDA);
  c10::cuda::set_device(device.index());
  // One for all that this thread does: what it allocated is free for it again without waiting, and nothing that it
  // does later overtakes what it did before.
  c10::cuda::setCurrentCUDAStream(c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index()));
  size_t free = 0, total = 0;
  check(cudaMemGetInfo(&free, &total), "asking for the card's memory");
  const double fraction =
      bytes.has_value() ? std::min(1.0, static_cast<double>(*bytes) / static_cast<double>(total)) : 1.0;
  c10::cuda::CUDACachingAllocator::setMemoryFraction(fraction, device.index());
  const at::NoGradGuard no_grad;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const at::Tensor x = at::ones({16, 16}, at::TensorOptions().dtype(dtype).device(device));
    at::mm(x, x);
    at::linear(x, x, x.select(0, 0));
  }
  check(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream(device.index()).stream()), "a first product");
  return memory(device).live;
}

DeviceMemory memory(at::Device device) {
  using c10::CachingAllocator::StatType;
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
  const auto all = static_cast<size_t>(StatType::AGGREGATE);
  return {stats.allocated_bytes[all].current, stats.allocated_bytes[all].peak, stats.segment[all].allocated};
}

void reset_peak(at::Device device) { c10::cuda::CUDACachingAllocator::resetPeakStats(device.index()); }
void give_back() { c10::cuda::CUDACachingAllocator::emptyCache(); }

std::unique_ptr<Copies> copies(at::Device device, std::shared_ptr<Ranks> ranks, bool over_nccl) {
  return std::make_unique<CudaCopies>(device, std::move(ranks), over_nccl);
}

}  // namespace stroma::engine::cuda

#else

namespace stroma::engine::cuda {
namespace {
[[noreturn]] void refuse() {
  fail("NOT_SET_UP",
       "[cuda] this build of the addon has no CUDA. Run `npx stroma setup --cuda`, or use device \"cpu\"");
}
}  // namespace

bool built() { return false; }
void check_device(at::Device) { refuse(); }
std::string bus_address(at::Device) { refuse(); }
at::Tensor pinned_bytes(int64_t) { refuse(); }
void pin(void*, int64_t) { refuse(); }
void unpin(void*) {}
void transfer(at::Device, void*, const void*, int64_t) { refuse(); }
void zero(at::Device, void*, int64_t) { refuse(); }
int64_t open(at::Device, std::optional<int64_t>) { refuse(); }
DeviceMemory memory(at::Device) { refuse(); }
void reset_peak(at::Device) { refuse(); }
void give_back() {}
std::unique_ptr<Copies> copies(at::Device, std::shared_ptr<Ranks>, bool) { refuse(); }

}  // namespace stroma::engine::cuda

#endif
