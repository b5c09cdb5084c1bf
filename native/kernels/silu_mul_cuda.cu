// stroma::silu_mul_forward and _backward, CUDA twins, on the current stream: both gradients in one pass.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/checks.h"
#include "kernels/silu_mul_cuda.cuh"

namespace stroma {
namespace {

constexpr int kThreads = 256;

// Thread blocks for n elements, of which a thread takes `pack` at once.
unsigned blocks_of(int64_t n, int64_t pack) {
  return static_cast<unsigned>(std::min<int64_t>((n / pack + kThreads - 1) / kThreads, 1 << 16));
}

at::Tensor forward_cuda(const at::Tensor& gate_in, const at::Tensor& up_in) {
  check_silu_mul(gate_in, up_in);
  const c10::cuda::CUDAGuard guard(gate_in.device());
  const at::Tensor gate = gate_in.contiguous(), up = up_in.contiguous();
  at::Tensor out = at::empty_like(gate);
  const int64_t n = gate.numel();
  if (n == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gate.scalar_type(), "stroma::silu_mul", [&] {
    using wide = at::opmath_type<scalar_t>;
    const scalar_t *g = gate.const_data_ptr<scalar_t>(), *u = up.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    by_packs<scalar_t>({g, u, to}, n * sizeof(scalar_t), [&](auto pack) {
      silu_mul_kernel<pack.value, wide>
          <<<blocks_of(n, pack.value), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(g, u, to, n);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> backward_cuda(const at::Tensor& dy_in, const at::Tensor& gate_in,
                                                 const at::Tensor& up_in) {
  check_silu_mul(gate_in, up_in);
  const c10::cuda::CUDAGuard guard(gate_in.device());
  const at::Tensor dy = dy_in.contiguous(), gate = gate_in.contiguous(), up = up_in.contiguous();
  at::Tensor dgate = at::empty_like(gate), dup = at::empty_like(up);
  const int64_t n = gate.numel();
  if (n == 0) return {dgate, dup};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, gate.scalar_type(), "stroma::silu_mul", [&] {
    using wide = at::opmath_type<scalar_t>;
    const scalar_t *d = dy.const_data_ptr<scalar_t>(), *g = gate.const_data_ptr<scalar_t>(),
                   *u = up.const_data_ptr<scalar_t>();
    scalar_t *dg = dgate.mutable_data_ptr<scalar_t>(), *du = dup.mutable_data_ptr<scalar_t>();
    by_packs<scalar_t>({d, g, u, dg, du}, n * sizeof(scalar_t), [&](auto pack) {
      silu_mul_backward_kernel<pack.value, wide>
          <<<blocks_of(n, pack.value), kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(d, g, u, dg, du, n);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return {dgate, dup};
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CUDA, m) {
  m.impl("silu_mul_forward", forward_cuda);
  m.impl("silu_mul_backward", backward_cuda);
}

}  // namespace stroma
