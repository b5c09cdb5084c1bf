// stroma::rms_norm_forward and _backward, CUDA twins, on the current stream: a warp has a row of up to 1,024 elements,
// a thread block a longer one. The weight's gradient is summed over chunks of rows, then over the chunks.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/checks.h"
#include "kernels/rms_norm_cuda.cuh"

namespace stroma {
namespace {

constexpr int64_t kWarpWidth = 1024;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// work(std::integral_constant<int, Group>, thread blocks)
template <typename Work>
void by_group(int64_t rows, int64_t width, const Work& work) {
  if (width <= kWarpWidth)
    work(std::integral_constant<int, 32>{}, static_cast<unsigned>(ceil_div(rows, kNormThreads / 32)));
  else
    work(std::integral_constant<int, kNormThreads>{}, static_cast<unsigned>(rows));
}

std::tuple<at::Tensor, at::Tensor> forward_cuda(const at::Tensor& x_in, const at::Tensor& weight_in, double eps) {
  check_rms_norm(x_in, weight_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = x_in.contiguous(), weight = weight_in.contiguous();
  at::Tensor y = at::empty_like(x);
  std::vector<int64_t> of_rows = x.sizes().vec();
  of_rows.back() = 1;
  at::Tensor r = at::empty(of_rows, x.options().dtype(wide_type(x)));
  const int64_t rows = r.numel(), width = x.size(-1);
  if (x.numel() == 0) return {y, r};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "stroma::rms_norm", [&] {
    using wide = at::opmath_type<scalar_t>;
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *w = weight.const_data_ptr<scalar_t>();
    scalar_t* to = y.mutable_data_ptr<scalar_t>();
    by_packs<scalar_t>({from, w, to}, width * sizeof(scalar_t), [&](auto n) {
      by_group(rows, width, [&](auto group, unsigned blocks) {
        rms_norm_kernel<n.value, group.value, wide><<<blocks, kNormThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            from, w, to, r.mutable_data_ptr<wide>(), rows, width, static_cast<wide>(eps));
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  });
  return {y, r};
}

at::Tensor weight_gradient(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& r) {
  const int64_t rows = r.numel(), width = x.size(-1);
  // As planned for (src/plan/memory-gradients.ts).
  const int64_t chunk = std::max<int64_t>(64, ceil_div(rows, 256)), chunks = ceil_div(rows, chunk);
  at::Tensor dweight = at::empty_like(weight), partial = at::empty({chunks, width}, r.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "stroma::rms_norm", [&] {
    using wide = at::opmath_type<scalar_t>;
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const scalar_t *d = dy.const_data_ptr<scalar_t>(), *from = x.const_data_ptr<scalar_t>();
    wide* sums = partial.mutable_data_ptr<wide>();
    by_packs<scalar_t>({d, from}, width * sizeof(scalar_t), [&](auto n) {
      const dim3 grid(static_cast<unsigned>(ceil_div(width, 32 * n.value)), static_cast<unsigned>(chunks));
      rms_norm_partial_kernel<n.value>
          <<<grid, kNormThreads, 0, stream>>>(d, from, r.const_data_ptr<wide>(), sums, rows, width, chunk);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
    rms_norm_weight_kernel<<<static_cast<unsigned>(ceil_div(width, 32)), kNormThreads, 0, stream>>>(
        static_cast<const wide*>(sums), dweight.mutable_data_ptr<scalar_t>(), chunks, width);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return dweight;
}

at::Tensor input_gradient_of(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& r) {
  const int64_t rows = r.numel(), width = x.size(-1);
  at::Tensor dx = at::empty_like(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "stroma::rms_norm", [&] {
    using wide = at::opmath_type<scalar_t>;
    const scalar_t *d = dy.const_data_ptr<scalar_t>(), *from = x.const_data_ptr<scalar_t>(),
                   *w = weight.const_data_ptr<scalar_t>();
    scalar_t* to = dx.mutable_data_ptr<scalar_t>();
    by_packs<scalar_t>({d, from, w, to}, width * sizeof(scalar_t), [&](auto n) {
      by_group(rows, width, [&](auto group, unsigned blocks) {
        rms_norm_input_kernel<n.value, group.value><<<blocks, kNormThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(
            d, from, w, r.const_data_ptr<wide>(), to, rows, width);
        C10_CUDA_KERNEL_LAUNCH_CHECK();
      });
    });
  });
  return dx;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward_cuda(const at::Tensor& dy_in, const at::Tensor& x_in,
                                                             const at::Tensor& weight_in, const at::Tensor& r,
                                                             bool need_x, bool need_weight) {
  check_rms_norm(x_in, weight_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor dy = dy_in.contiguous(), x = x_in.contiguous(), weight = weight_in.contiguous();
  const bool none = x.numel() == 0;
  at::Tensor dx, dweight;
  if (need_weight) dweight = none ? at::zeros_like(weight) : weight_gradient(dy, x, weight, r);
  if (need_x) dx = none ? at::empty_like(x) : input_gradient_of(dy, x, weight, r);
  return {dx, {}, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CUDA, m) {
  m.impl("rms_norm_forward", forward_cuda);
  m.impl("rms_norm_backward", backward_cuda);
}

}  // namespace stroma
