// Argument checks that the CPU and CUDA twins share.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>

#include <optional>

namespace stroma {

// Throws where a backward is itself to be differentiated: ours have no derivative.
inline void refuse_double_backward(const char* op, const char* when = "") {
  TORCH_CHECK(!at::GradMode::is_enabled(), "[stroma::", op, "] has no second derivative", when,
              ": call backward without create_graph");
}

// `t` is contiguous, of `n` elements of `dtype`, on `device`.
inline void check_flat(const char* op, const char* name, const at::Tensor& t, int64_t n, at::ScalarType dtype,
                       at::Device device) {
  TORCH_CHECK(t.numel() == n && t.scalar_type() == dtype && t.is_contiguous() && t.device() == device, "[stroma::", op,
              "] expected ", name, " contiguous with ", n, " elements of ", dtype, " on ", device, ", got ", t.numel(),
              " of ", t.scalar_type(), " on ", t.device());
}

inline int64_t quant_blocks(int64_t n) { return (n + 255) / 256; }

inline void check_blockwise(const char* op, const at::Tensor& values, const at::Tensor& code,
                            const at::Tensor& absmax) {
  const auto dtype = values.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16, "[stroma::", op,
              "] expected values of Float, Double or BFloat16, got ", dtype);
  check_flat(op, "values", values, values.numel(), dtype, values.device());
  check_flat(op, "code", code, values.numel(), at::kByte, values.device());
  check_flat(op, "absmax", absmax, quant_blocks(values.numel()), at::kFloat, values.device());
}

inline void check_split16(const char* op, const at::Tensor& x, const at::Tensor& param, const at::Tensor& master) {
  check_flat(op, "the float32 weight", x, x.numel(), at::kFloat, x.device());
  check_flat(op, "param", param, x.numel(), at::kBFloat16, x.device());
  check_flat(op, "master", master, x.numel(), at::kShort, x.device());
}

// How adamw_ keeps a weight. plain: in param, float32 or float64. The others: param is bfloat16, and the weight is a
// float32 master beside it, or param's bits and an int16 master's, or param alone, rounded stochastically.
enum class Weight { plain, master, split, stochastic };

struct AdamWArguments {
  at::Tensor& param;
  const std::optional<at::Tensor>& master;
  const at::Tensor& grad;
  at::Tensor& exp_avg;
  at::Tensor& exp_avg_sq;
  const std::optional<at::Tensor>& absmax1;
  const std::optional<at::Tensor>& absmax2;
  int64_t step;
  at::IntArrayRef key;  // (seed, step, tensor), and where the tensor is a part of one: its first element there

  bool quantized() const { return exp_avg.scalar_type() == at::kByte; }
  bool wide() const { return exp_avg.scalar_type() == at::kDouble; }
  int64_t first_element() const { return key.size() == 4 ? key[3] : 0; }
};

// Throws unless the tensors of `a` fit each other; says how its weight is kept.
inline Weight check_adamw(const AdamWArguments& a) {
  constexpr const char* op = "adamw_";
  const int64_t n = a.param.numel();
  const auto device = a.param.device();
  const auto kept = a.param.scalar_type(), moments = a.exp_avg.scalar_type(), grad = a.grad.scalar_type();
  TORCH_CHECK(kept == at::kFloat || kept == at::kDouble || kept == at::kBFloat16,
              "[stroma::adamw_] expected param of Float, Double or BFloat16, got ", kept);
  TORCH_CHECK(moments == (kept == at::kDouble ? at::kDouble : at::kFloat) || (a.quantized() && kept != at::kDouble),
              "[stroma::adamw_] expected exp_avg of ", kept == at::kDouble ? "Double" : "Float or Byte",
              " beside a param of ", kept, ", got ", moments);
  TORCH_CHECK(grad == at::kFloat || grad == at::kDouble || grad == at::kBFloat16,
              "[stroma::adamw_] expected grad of Float, Double or BFloat16, got ", grad);
  check_flat(op, "param", a.param, n, kept, device);
  check_flat(op, "grad", a.grad, n, grad, device);
  check_flat(op, "exp_avg", a.exp_avg, n, moments, device);
  check_flat(op, "exp_avg_sq", a.exp_avg_sq, n, moments, device);
  TORCH_CHECK(a.quantized() == a.absmax1.has_value() && a.quantized() == a.absmax2.has_value(),
              "[stroma::adamw_] expected absmax1 and absmax2 with moments of Byte and only there, got moments of ",
              moments);
  if (a.quantized()) {
    check_flat(op, "absmax1", *a.absmax1, quant_blocks(n), at::kFloat, device);
    check_flat(op, "absmax2", *a.absmax2, quant_blocks(n), at::kFloat, device);
  }
  TORCH_CHECK(a.step >= 1, "[stroma::adamw_] expected step >= 1 (updates count from one), got ", a.step);
  if (a.master.has_value()) {
    const auto dtype = a.master->scalar_type();
    TORCH_CHECK(kept == at::kBFloat16 && (dtype == at::kFloat || dtype == at::kShort),
                "[stroma::adamw_] expected a master of Float or Short beside a param of BFloat16, got ", dtype,
                " beside ", kept);
    check_flat(op, "master", *a.master, n, dtype, device);
    return dtype == at::kFloat ? Weight::master : Weight::split;
  }
  if (kept != at::kBFloat16) return Weight::plain;
  TORCH_CHECK((a.key.size() == 3 || a.key.size() == 4) && a.first_element() >= 0,
              "[stroma::adamw_] expected key (seed, step, tensor[, first element]) for a BFloat16 param without a "
              "master, got ",
              a.key);
  return Weight::stochastic;
}

inline void check_dropout(const at::Tensor& x, double p, const at::Tensor& key) {
  TORCH_CHECK(x.is_floating_point(), "[stroma::dropout] expected a floating x, got ", x.scalar_type());
  TORCH_CHECK(p >= 0 && p < 1, "[stroma::dropout] expected 0 <= p < 1, got ", p);
  TORCH_CHECK(key.scalar_type() == at::kLong && key.numel() == 4 && key.is_cpu() && key.is_contiguous(),
              "[stroma::dropout] expected key int64 [4] on the CPU (seed, step, micro-batch, block), got ",
              key.scalar_type(), " ", key.sizes(), " on ", key.device());
}

// Norms are computed in at least float32.
inline at::ScalarType wide_type(const at::Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline void check_rms_norm(const at::Tensor& x, const at::Tensor& weight) {
  TORCH_CHECK(x.is_floating_point() && x.dim() >= 1, "[stroma::rms_norm] expected a floating x [..., D], got ",
              x.scalar_type(), " ", x.sizes());
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == x.size(-1) && weight.scalar_type() == x.scalar_type() &&
                  weight.device() == x.device(),
              "[stroma::rms_norm] expected weight ", x.scalar_type(), " [", x.size(-1), "] on ", x.device(), ", got ",
              weight.scalar_type(), " ", weight.sizes(), " on ", weight.device());
}

inline void check_silu_mul(const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK(gate.is_floating_point() && gate.scalar_type() == up.scalar_type() && gate.sizes() == up.sizes() &&
                  gate.device() == up.device(),
              "[stroma::silu_mul] expected gate and up of one floating dtype, one shape and one device, got ",
              gate.scalar_type(), " ", gate.sizes(), " on ", gate.device(), " and ", up.scalar_type(), " ", up.sizes(),
              " on ", up.device());
}

inline void check_rotate(const at::Tensor& x, const at::Tensor& table) {
  TORCH_CHECK(x.is_floating_point() && x.dim() == 4 && x.size(3) % 2 == 0,
              "[stroma::rotate] expected a floating x [B, N, T, H] with an even H, got ", x.scalar_type(), " ",
              x.sizes());
  TORCH_CHECK(table.dim() == 3 && table.size(0) == x.size(0) && table.size(1) == x.size(2) &&
                  table.size(2) == x.size(3) && table.scalar_type() == x.scalar_type() && table.device() == x.device(),
              "[stroma::rotate] expected a table ", x.scalar_type(), " [B, T, H] = [", x.size(0), ", ", x.size(2), ", ",
              x.size(3), "] on ", x.device(), ", got ", table.scalar_type(), " ", table.sizes(), " on ",
              table.device());
}

inline void check_rotary_table(const at::Tensor& positions, int64_t head_dim, at::ScalarType dtype) {
  TORCH_CHECK(positions.scalar_type() == at::kLong && positions.dim() == 2,
              "[stroma::rotary_table] expected positions int64 [B, T], got ", positions.scalar_type(), " ",
              positions.sizes());
  TORCH_CHECK(head_dim > 0 && head_dim % 2 == 0, "[stroma::rotary_table] expected an even head_dim, got ", head_dim);
  TORCH_CHECK(at::isFloatingType(dtype), "[stroma::rotary_table] expected a floating dtype, got ", dtype);
}

// x, or a copy of it, whose rows of the last dim lie one element beside the next, without gaps between rows: what is
// made like it has its strides.
inline at::Tensor rows_dense(const at::Tensor& x) {
  return x.is_non_overlapping_and_dense() && x.stride(-1) == 1 ? x : x.contiguous();
}

}  // namespace stroma
