// The schemas of every operator of our own. They live in PyTorch's dispatcher: the eager API, the graph executor and
// Python (torch.ops.load_library) all reach them in the same way.
#include <torch/library.h>

TORCH_LIBRARY(stroma, m) {
  m.def(
      "adamw_(Tensor(a!) param, Tensor(b!)? master, Tensor grad, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
      "Tensor(e!)? absmax1, Tensor(f!)? absmax2, float lr, float beta1, float beta2, float epsilon, "
      "float weight_decay, int step, float gradient_scale, int[] key) -> ()");
  m.def("split16_(Tensor x, Tensor(a!) param, Tensor(b!) master) -> ()");
  m.def("join16_(Tensor param, Tensor master, Tensor(a!) out) -> ()");
  m.def("quantize_blockwise_(Tensor x, Tensor(a!) code, Tensor(b!) absmax, bool signed) -> ()");
  m.def("dequantize_blockwise_(Tensor code, Tensor absmax, bool signed, Tensor(a!) out) -> ()");
  m.def("dynamic_map(bool signed) -> Tensor");
  m.def(
      "cross_entropy_head(Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor scale, int chunk, "
      "int ignore_index) -> Tensor");
  m.def("dropout(Tensor x, float p, Tensor key, int site) -> Tensor");
  m.def("dropout_apply(Tensor x, float p, Tensor key, int site) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)");
  m.def(
      "rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor r, bool need_x, bool need_weight) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "rotary_table(Tensor positions, int head_dim, float theta, float? factor, float? low_freq_factor, "
      "float? high_freq_factor, float? original_max_positions, ScalarType dtype) -> Tensor");
  m.def("rotate(Tensor x, Tensor table) -> Tensor");
  m.def("rotate_apply(Tensor x, Tensor table, bool back) -> Tensor");
  m.def("silu_mul(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_forward(Tensor gate, Tensor up) -> Tensor");
  m.def("silu_mul_backward(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def(
      "ring_attention(Tensor q, Tensor k, Tensor v, Tensor? document_ids, bool is_causal, float? scale, str group, "
      "float dropout_p=0.0) -> Tensor");
  m.def(
      "all_to_all_attention(Tensor q, Tensor k, Tensor v, Tensor? document_ids, bool is_causal, float? scale, "
      "str group, float dropout_p=0.0) -> Tensor");
  m.def("sequence_positions(int tokens, int rank, int ranks, bool zigzag) -> Tensor");
  m.def("split_sequence(Tensor x, int dim, int rank, int ranks, bool zigzag) -> Tensor");
  m.def("merge_sequence(Tensor[] shares, int dim, bool zigzag) -> Tensor");
}
