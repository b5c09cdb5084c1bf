// stroma::quantize_blockwise_ and dequantize_blockwise_, CUDA twin: the contract and the bits of blockwise_cpu.cc, on
// the current stream.
#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/checks.h"
#include "kernels/maps_cuda.h"

namespace stroma {
namespace {

template <typename T>
__device__ __forceinline__ float to_float(T x) {
  return static_cast<float>(x);
}

template <bool Signed, typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const WarpMap<Signed, false>* __restrict__ device_map, const T* __restrict__ x,
                    uint8_t* __restrict__ code, float* __restrict__ absmax, const int64_t n, const bool aligned) {
  __shared__ WarpMap<Signed, false> map;
  copy_map(device_map, map);
  each_block(n, aligned, [&](auto whole, int64_t b, int64_t i) {
    constexpr bool Whole = decltype(whole)::value;
    const Eight<T> all = load_eight<Whole>(x, i, n);
    float values[8];
    STROMA_UNROLL
    for (int k = 0; k < 8; ++k) values[k] = to_float(all.at[k]);
    store_eight<Whole>(code, i, n, encode_eight(map, values, absmax + b));
  });
}

template <typename T>
__global__ void dequantize_kernel(const float* __restrict__ value, const uint8_t* __restrict__ code,
                                  const float* __restrict__ absmax, T* __restrict__ out, const int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
    out[i] = static_cast<T>(value[code[i]] * absmax[i / kQuantBlock]);
}

void quantize_cuda(const at::Tensor& x, at::Tensor& code, at::Tensor& absmax, bool is_signed) {
  check_blockwise("quantize_blockwise_", x, code, absmax);
  const int64_t n = x.numel();
  if (n == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, x.scalar_type(), "stroma::quantize_blockwise_", [&] {
    const scalar_t* values = x.const_data_ptr<scalar_t>();
    uint8_t* codes = code.mutable_data_ptr<uint8_t>();
    float* most = absmax.mutable_data_ptr<float>();
    const bool aligned = (reinterpret_cast<uintptr_t>(values) | reinterpret_cast<uintptr_t>(codes)) % 16 == 0;
    const int blocks = grid((n + 7) / 8);
    if (is_signed)
      quantize_kernel<<<blocks, kThreads, 0, stream>>>(signed_map_on(x.device()), values, codes, most, n, aligned);
    else
      quantize_kernel<<<blocks, kThreads, 0, stream>>>(unsigned_map_on(x.device()), values, codes, most, n, aligned);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

void dequantize_cuda(const at::Tensor& code, const at::Tensor& absmax, bool is_signed, at::Tensor& out) {
  check_blockwise("dequantize_blockwise_", out, code, absmax);
  const int64_t n = out.numel();
  if (n == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  // An address in the device's memory: only taken here, not read.
  const float* value = is_signed ? signed_map_on(out.device())->value : unsigned_map_on(out.device())->value;
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, out.scalar_type(), "stroma::dequantize_blockwise_", [&] {
    dequantize_kernel<<<grid(n), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
        value, code.const_data_ptr<uint8_t>(), absmax.const_data_ptr<float>(), out.mutable_data_ptr<scalar_t>(), n);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

template <typename Warp, typename Map>
at::Tensor upload(const Map& map, c10::Device device) {
  const auto made = std::make_unique<Warp>();
  Warp::make(*made, map);
  at::Tensor bytes = at::empty({sizeof(Warp)}, at::TensorOptions().dtype(at::kByte).device(device));
  // On the current stream, which these bytes may have been freed on a moment ago and which other streams do not wait
  // for; and done, since whoever comes next may be on another.
  const auto stream = c10::cuda::getCurrentCUDAStream(device.index());
  C10_CUDA_CHECK(cudaMemcpyAsync(bytes.mutable_data_ptr(), made.get(), sizeof(Warp), cudaMemcpyHostToDevice, stream));
  C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  return bytes;
}

// On every device that asked. Never freed: at exit the device may be gone before this would be.
template <typename Warp, typename Map>
const Warp* map_on(const Map& map, c10::Device device) {
  static std::mutex mutex;
  static auto* maps = new std::vector<at::Tensor>(64);
  const std::lock_guard lock(mutex);
  at::Tensor& mine = maps->at(device.index());
  if (!mine.defined()) mine = upload<Warp>(map, device);
  return static_cast<const Warp*>(mine.const_data_ptr());
}

}  // namespace

const MomentMap* moment_map_on(c10::Device device) { return map_on<MomentMap>(signed_map(), device); }
const SignedMap* signed_map_on(c10::Device device) { return map_on<SignedMap>(signed_map(), device); }
const UnsignedMap* unsigned_map_on(c10::Device device) { return map_on<UnsignedMap>(unsigned_map(), device); }

TORCH_LIBRARY_IMPL(stroma, CUDA, m) {
  m.impl("quantize_blockwise_", quantize_cuda);
  m.impl("dequantize_blockwise_", dequantize_cuda);
}

}  // namespace stroma
