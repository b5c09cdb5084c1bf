// stroma::adamw_, CUDA twin: the contract of adamw_cpu.cc, on the current stream, one launch, any number of elements.
// The root is the correctly rounded one, as PyTorch's own CUDA kernels take it; with 8-bit moments the bits are the
// CPU's.
#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>

#include "kernels/adamw.h"
#include "kernels/checks.h"
#include "kernels/maps_cuda.h"
#include "kernels/rounding.h"

namespace stroma {
namespace {

struct Gradient {
  const void* data;
  at::ScalarType dtype;

  template <typename T>
  __device__ T at(int64_t i) const {
    if (dtype == at::kFloat) return static_cast<T>(static_cast<const float*>(data)[i]);
    if (dtype == at::kDouble) return static_cast<T>(static_cast<const double*>(data)[i]);
    return static_cast<T>(bfloat16_to_float(static_cast<const uint16_t*>(data)[i]));
  }
};

// Where a weight is kept, and how. The kind is the same for a whole launch: its branches do not diverge.
struct WeightPlace {
  void* param;
  void* master;
  Weight kind;
  PhiloxKey key;
  int64_t first;

  template <typename T>
  __device__ T load(int64_t i) const {
    if (kind == Weight::plain) return static_cast<const T*>(param)[i];
    if (kind == Weight::master) return static_cast<const float*>(master)[i];
    const uint16_t high = static_cast<const uint16_t*>(param)[i];
    return kind == Weight::split ? join16(high, static_cast<const int16_t*>(master)[i]) : bfloat16_to_float(high);
  }
  template <typename T>
  __device__ void store(int64_t i, T w) const {
    if (kind == Weight::plain) {
      static_cast<T*>(param)[i] = w;
      return;
    }
    const float narrow = static_cast<float>(w);
    uint16_t* high = static_cast<uint16_t*>(param) + i;
    if (kind == Weight::master) {
      static_cast<float*>(master)[i] = narrow;
      *high = nearest_bfloat16(narrow);
    } else if (kind == Weight::split) {
      const Split16 halves = split16(narrow);
      *high = halves.high;
      static_cast<int16_t*>(master)[i] = halves.low;
    } else {
      const int64_t element = first + i;
      *high = stochastic_bfloat16(narrow, rounding_draw(philox4x32(key, static_cast<uint64_t>(element) / 8), element));
    }
  }
};

template <typename T>
__global__ void adamw_kernel(const AdamWStep<T> s, const Gradient grad, const WeightPlace weight, T* __restrict__ m,
                             T* __restrict__ v, const int64_t n) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += stride) {
    T m_i = m[i], v_i = v[i];
    const T root = square_root(adamw_moments(s, grad.at<T>(i), m_i, v_i));
    weight.store(i, adamw_parameter(s, weight.load<T>(i), m_i, root));
    m[i] = m_i;
    v[i] = v_i;
  }
}

// A thread block takes one block of 256 elements at a time.
__global__ void adamw_quantized_kernel(const AdamWStep<float> s, const Gradient grad, const WeightPlace weight,
                                       const DynamicMap<true>* __restrict__ map1,
                                       const DynamicMap<false>* __restrict__ map2, uint8_t* __restrict__ code1,
                                       uint8_t* __restrict__ code2, float* __restrict__ absmax1,
                                       float* __restrict__ absmax2, const int64_t n) {
  __shared__ uint32_t most[kQuantBlock / 32];
  for (int64_t b = blockIdx.x; b * kQuantBlock < n; b += gridDim.x) {
    const int64_t i = b * kQuantBlock + threadIdx.x;
    float m = 0.0f, v = 0.0f;
    if (i < n) {
      m = map1->value[code1[i]] * absmax1[b];
      v = map2->value[code2[i]] * absmax2[b];
      float p = weight.load<float>(i);
      const float g = grad.at<float>(i);
      if (s.from_moment())
        adamw_quantized<true>(s, g, p, m, v);
      else
        adamw_quantized<false>(s, g, p, m, v);
      weight.store(i, p);
    }
    // encode_element synchronises before it writes absmax, so that every thread has read the old one.
    const uint8_t mine1 = encode_element<true, true>(*map1, m, absmax1 + b, most);
    const uint8_t mine2 = encode_element<false, false>(*map2, v, absmax2 + b, most);
    if (i < n) {
      code1[i] = mine1;
      code2[i] = mine2;
    }
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
  const int blocks = static_cast<int>(std::min<int64_t>(quant_blocks(n), 1 << 16));
  const Gradient gradient{grad.const_data_ptr(), grad.scalar_type()};
  WeightPlace weight{param.mutable_data_ptr(), master.has_value() ? master->mutable_data_ptr() : nullptr, kind, {}, 0};
  if (kind == Weight::stochastic) {
    weight.key = rounding_key(key[0], key[1], key[2]);
    weight.first = a.first_element();
  }
  const auto launch = [&]<typename T>(const AdamWStep<T>& s) {
    adamw_kernel<T><<<blocks, kQuantBlock, 0, stream>>>(s, gradient, weight, exp_avg.mutable_data_ptr<T>(),
                                                        exp_avg_sq.mutable_data_ptr<T>(), n);
  };
  if (a.wide()) {
    launch(AdamWStep<double>::make(lr, beta1, beta2, epsilon, weight_decay, step, gradient_scale));
  } else {
    const auto s = AdamWStep<float>::make(lr, beta1, beta2, epsilon, weight_decay, step, gradient_scale);
    if (a.quantized())
      adamw_quantized_kernel<<<blocks, kQuantBlock, 0, stream>>>(
          s, gradient, weight, signed_map_on(param.device()), unsigned_map_on(param.device()),
          exp_avg.mutable_data_ptr<uint8_t>(), exp_avg_sq.mutable_data_ptr<uint8_t>(),
          absmax1->mutable_data_ptr<float>(), absmax2->mutable_data_ptr<float>(), n);
    else
      launch(s);
  }
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
  const int blocks = static_cast<int>(std::min<int64_t>(quant_blocks(n), 1 << 16));
  split16_kernel<<<blocks, kQuantBlock, 0, c10::cuda::getCurrentCUDAStream()>>>(
      x.const_data_ptr<float>(), static_cast<uint16_t*>(param.mutable_data_ptr()), master.mutable_data_ptr<int16_t>(),
      n);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void join16_cuda(const at::Tensor& param, const at::Tensor& master, at::Tensor& out) {
  check_split16("join16_", out, param, master);
  const int64_t n = out.numel();
  if (n == 0) return;
  const c10::cuda::CUDAGuard guard(out.device());
  const int blocks = static_cast<int>(std::min<int64_t>(quant_blocks(n), 1 << 16));
  join16_kernel<<<blocks, kQuantBlock, 0, c10::cuda::getCurrentCUDAStream()>>>(
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
