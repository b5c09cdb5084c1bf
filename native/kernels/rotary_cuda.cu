// stroma::rotary_table and rotate_apply, CUDA twins, on the current stream.
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/checks.h"
#include "kernels/rotary_cuda.cuh"

namespace stroma {
namespace {

at::Tensor table_cuda(const at::Tensor& positions_in, int64_t head_dim, double theta, std::optional<double> factor,
                      std::optional<double> low_freq_factor, std::optional<double> high_freq_factor,
                      std::optional<double> original_max_positions, at::ScalarType dtype) {
  check_rotary_table(positions_in, head_dim, dtype);
  const c10::cuda::CUDAGuard guard(positions_in.device());
  const at::Tensor positions = positions_in.contiguous();
  at::Tensor table = at::empty({positions.size(0), positions.size(1), head_dim}, positions.options().dtype(dtype));
  const int64_t rows = positions.numel(), half = head_dim / 2;
  if (rows == 0) return table;
  const auto scaling = RotaryScaling::of(factor, low_freq_factor, high_freq_factor, original_max_positions);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "stroma::rotary_table", [&] {
    using wide = at::opmath_type<scalar_t>;
    rotary_table_kernel<wide>
        <<<static_cast<unsigned>(std::min<int64_t>(rows, 2048)), 64, 0, c10::cuda::getCurrentCUDAStream()>>>(
            positions.const_data_ptr<int64_t>(), table.mutable_data_ptr<scalar_t>(), rows, half,
            RotaryFrequencies<wide>(theta, head_dim, scaling));
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return table;
}

at::Tensor apply_cuda(const at::Tensor& x_in, const at::Tensor& table_in, bool back) {
  check_rotate(x_in, table_in);
  const c10::cuda::CUDAGuard guard(x_in.device());
  const at::Tensor x = rows_dense(x_in), table = table_in.contiguous();
  at::Tensor out = at::empty_like(x);
  if (x.numel() == 0) return out;
  const int64_t heads = x.size(1), tokens = x.size(2), half = x.size(3) / 2;
  const RotateStrides strides{x.stride(0), x.stride(1), x.stride(2)};
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "stroma::rotate", [&] {
    using wide = at::opmath_type<scalar_t>;
    const scalar_t *from = x.const_data_ptr<scalar_t>(), *turns = table.const_data_ptr<scalar_t>();
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    by_packs<scalar_t>({from, turns, to}, half * sizeof(scalar_t), [&](auto n) {
      const int64_t packs = heads * (half / n.value);
      const auto threads = static_cast<unsigned>(std::clamp<int64_t>((packs + 31) / 32 * 32, 32, 128));
      rotate_kernel<n.value, wide>
          <<<static_cast<unsigned>(x.size(0) * tokens), threads, 0, c10::cuda::getCurrentCUDAStream()>>>(
              from, turns, to, tokens, static_cast<int>(heads), static_cast<int>(half), strides, back);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(stroma, CUDA, m) {
  m.impl("rotary_table", table_cuda);
  m.impl("rotate_apply", apply_cuda);
}

}  // namespace stroma
