#include "engine/cuda_device.h"

#include "engine/error.h"

#ifdef STROMA_CUDA

#include <ATen/Functions.h>
#include <ATen/ops/from_blob.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "engine/layout.h"
#include "engine/nccl_links.h"
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
// issued (disk: done), then lets the stream wait for the events. So the thread that issues passes never blocks on a
// disk.
class CudaCopies final : public Copies {
 public:
  CudaCopies(at::Device device, std::shared_ptr<Ranks> ranks, bool over_nccl)
      : device_(device),
        queues_(lines_among(ranks.get())),
        busy_(queues_.size()),
        threads_(queues_.size()),
        ranks_(std::move(ranks)) {
    if (over_nccl) links_ = nccl::links(device_, ranks_);
    const c10::cuda::CUDAGuard guard(device_);
    for (int direction = 0; direction < 2; ++direction)
      streams_.push_back(c10::cuda::getStreamFromPool(/*isHighPriority=*/true, device_.index()));
  }
  ~CudaCopies() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_)
      if (thread.joinable()) thread.join();
  }

  void begin(const Tape& tape, const Memory& memory, Timeline* timeline) override {
    if (links_) links_->open(tape);
    const std::lock_guard lock(mutex_);
    tape_ = &tape;
    memory_ = &memory;
    timeline_ = timeline;
    const size_t n = tape.instructions.size();
    issued_.assign(n, 0);
    failure_ = nullptr;
    aborted_ = false;
    counts_ = {};
    // An event only where another queue waits for it.
    wanted_.assign(n, 0);
    for (const Instruction& at : tape.instructions)
      for (const int w : at.waits) wanted_[w] = 1;
    const bool timing = timeline != nullptr;
    while (events_.size() < n) events_.emplace_back();
    if (timing) {
      starts_.clear();
      ends_.clear();
      for (size_t i = 0; i < n; ++i) {
        starts_.emplace_back(true);
        ends_.emplace_back(true);
      }
      base_.emplace(true);
      base_->record(compute());
      base_seconds_ = steady_seconds();
    }
    // Copies of this step follow the work that came before it.
    begin_.record(compute());
    for (const auto& stream : streams_) check(cudaStreamWaitEvent(stream.stream(), begin_.get(), 0), "a stream's wait");
  }

  void issue(int instruction) override {
    const Instruction& copy = tape_->instructions[instruction];
    const int q = copy.line();
    counts_.bytes[static_cast<int>(copy.queue)] += copy.bytes;
    {
      const std::lock_guard lock(mutex_);
      queues_[q].push_back(instruction);
      if (!threads_[q].joinable()) threads_[q] = std::thread([this, q] { serve(q); });
    }
    changed_.notify_all();
  }

  void await(int instruction) override {
    const auto& waits = tape_->instructions[instruction].waits;
    if (!waits.empty()) {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return failure_ != nullptr || ready(waits); });
      if (failure_ != nullptr) std::rethrow_exception(failure_);
      lock.unlock();
      for (const int w : waits)
        if (on_stream(w)) check(cudaStreamWaitEvent(compute(), events_[w].get(), 0), "a stream's wait");
    }
    if (timeline_ != nullptr) starts_[instruction].record(compute());
  }

  void finished(int instruction) override {
    if (timeline_ != nullptr) ends_[instruction].record(compute());
    if (wanted_[instruction]) events_[instruction].record(compute());
    {
      const std::lock_guard lock(mutex_);
      issued_[instruction] = 1;
    }
    changed_.notify_all();
  }

  void end(bool abort) override {
    {
      std::unique_lock lock(mutex_);
      if (abort) aborted_ = true;
      changed_.notify_all();
      changed_.wait(lock, [this] {
        for (size_t q = 0; q < queues_.size(); ++q)
          if (!queues_[q].empty() || busy_[q]) return false;
        return true;
      });
    }
    for (const auto& stream : streams_) check(cudaStreamSynchronize(stream.stream()), "the copies of a step");
    check(cudaStreamSynchronize(compute()), "the passes of a step");
    if (timeline_ != nullptr && !abort) tell_times();
    tape_ = nullptr;
    if (!abort && failure_ != nullptr) std::rethrow_exception(failure_);
  }

 private:
  cudaStream_t compute() const { return c10::cuda::getCurrentCUDAStream(device_.index()).stream(); }
  bool on_stream(int instruction) const {
    const Instruction& at = tape_->instructions[instruction];
    return !at.queued() || at.queue == CopyQueue::kIn || at.queue == CopyQueue::kOut;
  }
  bool ready(const std::vector<int>& waits) const {
    for (const int w : waits)
      if (!issued_[w]) return false;
    return true;
  }

  void serve(int q) {
    const c10::cuda::CUDAGuard guard(device_);
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] {
        return stopping_ || (!queues_[q].empty() &&
                             (ready(tape_->instructions[queues_[q].front()].waits) || aborted_ || failure_ != nullptr));
      });
      if (stopping_) return;
      const int instruction = queues_[q].front();
      queues_[q].pop_front();
      if (failure_ != nullptr || aborted_) {
        changed_.notify_all();
        continue;
      }
      busy_[q] = true;
      lock.unlock();
      std::exception_ptr failure;
      try {
        carry_out(instruction);
      } catch (...) {
        failure = std::current_exception();
      }
      lock.lock();
      busy_[q] = false;
      if (failure != nullptr && failure_ == nullptr) failure_ = failure;
      issued_[instruction] = 1;
      changed_.notify_all();
    }
  }

  const Place& at(int place) const { return tape_->places[place]; }
  void carry_out(int instruction) {
    const Instruction& copy = tape_->instructions[instruction];
    if (!on_stream(instruction)) {
      // The host touches these bytes itself: what streams still do to them must be over.
      for (const int w : copy.waits)
        if (on_stream(w)) check(cudaEventSynchronize(events_[w].get()), "waiting for a copy");
      const double start = steady_seconds();
      if (copy.op != Instruction::Op::kCopy)
        links_ && !is_word(*tape_, copy) ? links_->exchange(*tape_, *memory_, copy)
                                         : exchange(*tape_, *memory_, copy, *ranks_);
      else if (copy.queue == CopyQueue::kLoad)
        memory_->disk().read(at(copy.from).offset + copy.at, memory_->address(at(copy.to)) + copy.at, copy.bytes);
      else
        memory_->disk().write(at(copy.to).offset + copy.at, memory_->address(at(copy.from)) + copy.at, copy.bytes);
      if (timeline_ != nullptr) {
        timeline_->start[instruction] = start;
        timeline_->end[instruction] = steady_seconds();
      }
      return;
    }
    const cudaStream_t stream = streams_[static_cast<int>(copy.queue)].stream();
    for (const int w : copy.waits)
      if (on_stream(w)) check(cudaStreamWaitEvent(stream, events_[w].get(), 0), "a stream's wait");
    if (timeline_ != nullptr) starts_[instruction].record(stream);
    check(cudaMemcpyAsync(memory_->address(at(copy.to)) + copy.at, memory_->address(at(copy.from)) + copy.at,
                          static_cast<size_t>(copy.bytes), cudaMemcpyDefault, stream),
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

  at::Device device_;
  std::vector<c10::cuda::CUDAStream> streams_;  // in, out
  std::vector<Event> events_, starts_, ends_;   // by instruction
  std::optional<Event> base_;
  Event begin_;
  double base_seconds_ = 0;
  std::mutex mutex_;
  std::condition_variable changed_;
  // By Instruction::line().
  std::vector<std::deque<int>> queues_;
  std::vector<char> busy_;
  std::vector<std::thread> threads_;
  const std::shared_ptr<Ranks> ranks_;
  std::unique_ptr<nccl::Links> links_;  // null: over Gloo
  const Tape* tape_ = nullptr;
  const Memory* memory_ = nullptr;
  Timeline* timeline_ = nullptr;
  std::vector<char> issued_, wanted_;
  std::exception_ptr failure_;
  bool aborted_ = false, stopping_ = false;
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
  try {
    pin(data, static_cast<int64_t>(size));
  } catch (const Error&) {
    ::munmap(data, size);
    throw;
  }
  return at::from_blob(
      data, {static_cast<int64_t>(size)},
      [size](void* at) {
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
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), c10::cuda::getCurrentCUDAStream(device.index()).stream()),
        "zeroing");
}

void limit_memory(at::Device device, std::optional<int64_t> bytes) {
  size_t free = 0, total = 0;
  const c10::cuda::CUDAGuard guard(device);
  check(cudaMemGetInfo(&free, &total), "asking for the card's memory");
  const double fraction =
      bytes.has_value() ? std::min(1.0, static_cast<double>(*bytes) / static_cast<double>(total)) : 1.0;
  c10::cuda::CUDACachingAllocator::setMemoryFraction(fraction, device.index());
}

DeviceMemory memory(at::Device device) {
  using c10::CachingAllocator::StatType;
  const auto stats = c10::cuda::CUDACachingAllocator::getDeviceStats(device.index());
  const auto all = static_cast<size_t>(StatType::AGGREGATE);
  return {stats.allocated_bytes[all].current, stats.allocated_bytes[all].peak, stats.segment[all].allocated};
}

void reset_peak(at::Device device) { c10::cuda::CUDACachingAllocator::resetPeakStats(device.index()); }
void give_back() { c10::cuda::CUDACachingAllocator::emptyCache(); }

struct StreamScope::State {
  c10::cuda::CUDAStreamGuard guard;
};
StreamScope::StreamScope(at::Device device) {
  // One stream a thread: what it allocated last time is free for it again without waiting.
  thread_local std::optional<c10::cuda::CUDAStream> stream;
  if (!stream.has_value()) stream = c10::cuda::getStreamFromPool(/*isHighPriority=*/false, device.index());
  state_ = std::unique_ptr<State>(new State{c10::cuda::CUDAStreamGuard(*stream)});
}
StreamScope::~StreamScope() = default;

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
void limit_memory(at::Device, std::optional<int64_t>) { refuse(); }
DeviceMemory memory(at::Device) { refuse(); }
void reset_peak(at::Device) { refuse(); }
void give_back() {}
struct StreamScope::State {};
StreamScope::StreamScope(at::Device) { refuse(); }
StreamScope::~StreamScope() = default;
std::unique_ptr<Copies> copies(at::Device, std::shared_ptr<Ranks>, bool) { refuse(); }

}  // namespace stroma::engine::cuda

#endif
