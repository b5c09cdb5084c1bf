// stroma::adamw_, CUDA twin: the contract of adamw_cpu.cc, on the current stream, one launch, any number of elements.
// The root is the correctly rounded one, as PyTorch's own CUDA kernels take it; with 8-bit moments the bits are the
// CPU's.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "kernels/adamw_cuda.cuh"

namespace stroma {
namespace {

bool aligned(std::initializer_list<const void*> all) {
  return std::all_of(all.begin(), all.end(), [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

// Calls with the gradient's elements: float, double, or bfloat16's bits.
template <typename Call>
void with_gradient(const at::Tensor& grad, const Call& call) {
  if (grad.scalar_type() == at::kFloat)
    call(grad.const_data_ptr<float>());
  else if (grad.scalar_type() == at::kDouble)
    call(grad.const_data_ptr<double>());
  else
    call(static_cast<const uint16_t*>(grad.const_data_ptr()));
}

template <typename Call>
void with_weight(Weight kind, const Call& call) {
  switch (kind) {
    case Weight::plain:
      return call(std::integral_constant<Weight, Weight::plain>());
    case Weight::master:
      return call(std::integral_constant<Weight, Weight::master>());
    case Weight::split:
      return call(std::integral_constant<Weight, Weight::split>());
    case Weight::stochastic:
      return call(std::integral_constant<Weight, Weight::stochastic>());
  }
}

void adamw_cuda(at::Tensor& param, const std::optional<at::Tensor>& master, const at::Tensor& grad, at::Tensor& exp_avg,
                at::Tensor& exp_avg_sq, const std::optional<at::Tensor>& absmax1,
                const std::optional<at::Tensor>& absmax2, double lr, double beta1, double beta2, double epsilon,
                double weight_decay, int64_t step, double gradient_scale, at::IntArrayRef key) {
  const AdamWArguments a{param, master, grad, exp_avg, exp_avg_sq, absmax1, absmax2, step, key};
  const Weight kind = check_adamw(a);
  const int64_t n = param.numel();
  if (n == 0) return;
  const c10::cuda::CUDAGuard guard(param.device());
  const auto stream = c10::cuda::getCurrentCUDAStream();
  if (a.wide()) {
    const auto s = AdamWStep<double>::make(lr, beta1, beta2, epsilon, weight_decay, step, gradient_scale);
    with_gradient(grad, [&](const auto* g) {
      adamw_wide_kernel<<<grid(n), kThreads, 0, stream>>>(s, g, param.mutable_data_ptr<double>(),
                                                          exp_avg.mutable_data_ptr<double>(),
                                                          exp_avg_sq.mutable_data_ptr<double>(), n);
    });
    C10_CUDA_KERNEL_LAUNCH_CHECK();
    return;
  }
  const auto s = AdamWStep<float>::make(lr, beta1, beta2, epsilon, weight_decay, step, gradient_scale);
  void* const held = master.has_value() ? master->mutable_data_ptr() : nullptr;
  WeightPlace weight{param.mutable_data_ptr(), held, {}, 0};
  const bool whole =
      aligned({weight.param, held, grad.const_data_ptr(), exp_avg.const_data_ptr(), exp_avg_sq.const_data_ptr()});
  if (kind == Weight::stochastic) {
    weight.key = rounding_key(key[0], key[1], key[2]);
    weight.first = a.first_element();
  }
  const int blocks = grid((n + 7) / 8);
  with_weight(kind, [&](auto chosen) {
    constexpr Weight Kind = decltype(chosen)::value;
    with_gradient(grad, [&](const auto* g) {
      if (a.quantized())
        adamw_quantized_kernel<Kind><<<blocks, kThreads, 0, stream>>>(
            s, g, weight, moment_map_on(param.device()), unsigned_map_on(param.device()),
            exp_avg.mutable_data_ptr<uint8_t>(), exp_avg_sq.mutable_data_ptr<uint8_t>(),
            absmax1->mutable_data_ptr<float>(), absmax2->mutable_data_ptr<float>(), n, whole);
      else
        adamw_kernel<Kind><<<blocks, kThreads, 0, stream>>>(s, g, weight, exp_avg.mutable_data_ptr<float>(),
                                                            exp_avg_sq.mutable_data_ptr<float>(), n, whole);
    });
  });
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

__global__ void split16_kernel(const float* __restrict__ x, uint16_t* __restrict__ param, int16_t* __restrict__ low,
                               const int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    const Split16 halves = split16(x[i]);
    param[i] = halves.high;
    low[i] = halves.low;
  }
}
__global__ void join16_kernel(const uint16_t* __restrict__ param, const int16_t* __restrict__ low,
                              float* __restrict__ out, const int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride)
    out[i] = join16(param[i], low[i]);
}

void split16_cuda(const at::Tensor& x, at::Tensor& param, at::Tensor& master) {
  check_split16("split16_", x, param, master);
  const int64_t n = x.numel();
  if (n == 0) return;
  const c10::cuda::CUDAGuard guard(x.device());
  const int blocks = grid(n);
  split16_kernel<<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      x.const_data_ptr<float>(), static_cast<uint16_t*>(param.mutable_data_ptr()), master.mutable_data_ptr<int16_t>(),
      n);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void join16_cuda(const at::Tensor& param, const at::Tensor& master, at::Tensor& out) {
  check_split16("join16_", out, param, master);
  const int64_t n = out.numel();
  if (n == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  const int blocks = grid(n);
  join16_kernel<<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
      static_cast<const uint16_t*>(param.const_data_ptr()), master.const_data_ptr<int16_t>(),
      out.mutable_data_ptr<float>(), n);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CUDA, m) {
  m.impl("adamw_", adamw_cuda);
  m.impl("split16_", split16_cuda);
  m.impl("join16_", join16_cuda);
}

}  // namespace stroma
