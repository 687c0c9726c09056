// Operators that run on the device's own stream; every other one goes to the host and is counted.
#pragma once
#include <string>
#include <vector>

namespace sim {

// How the shape and type of a result are known before the operator has run.
enum class Rule {
  Meta,     // torch's own meta kernel tells
  Promote,  // elementwise: sizes broadcast, types promote
  Float,    // the same, and integers become float
  Bool,     // elementwise comparison
  Where,    // elementwise over all but the first argument
  Product,  // matrices
  Cat,      // a list of tensors, end to end
  InPlace,  // elementwise into the first argument
};

struct NativeOperators {
  Rule rule;
  std::vector<const char*> names;
};

// clang-format off
inline const std::vector<NativeOperators>& native_operators() {
  static const std::vector<NativeOperators> all = {
    {Rule::Promote,
     {"add.Tensor", "sub.Tensor", "rsub.Scalar", "mul.Tensor", "div.Tensor_mode", "remainder.Tensor",
      "remainder.Scalar", "floor_divide", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "maximum", "minimum", "neg", "abs",
      "floor", "ceil", "round", "sign", "silu", "gelu", "relu", "bitwise_and.Tensor", "bitwise_and.Scalar",
      "bitwise_or.Tensor", "bitwise_not", "bitwise_right_shift.Tensor", "bitwise_right_shift.Tensor_Scalar",
      "bitwise_left_shift.Tensor", "__rshift__.Scalar", "__rshift__.Tensor", "__lshift__.Scalar", "__lshift__.Tensor"}},
    {Rule::Float,
     {"div.Tensor", "exp", "log", "cos", "sin", "sqrt", "rsqrt", "reciprocal", "sigmoid", "tanh", "erf"}},
    {Rule::Bool,
     {"eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar", "lt.Tensor", "lt.Scalar", "le.Tensor", "le.Scalar",
      "gt.Tensor", "gt.Scalar", "ge.Tensor", "ge.Scalar", "logical_not", "logical_and", "logical_or", "isnan", "isneginf", "isposinf"}},
    {Rule::Where, {"where.self"}},
    {Rule::Product, {"mm", "bmm", "addmm"}},
    {Rule::Cat, {"cat"}},
    {Rule::InPlace,
     {"add_.Tensor", "sub_.Tensor", "mul_.Tensor", "div_.Tensor", "div_.Tensor_mode", "pow_.Scalar", "exp_", "rsqrt_",
      "sigmoid_", "silu_", "relu_", "fill_.Scalar", "fill_.Tensor", "zero_", "bitwise_and_.Tensor",
      "bitwise_or_.Tensor", "masked_fill_.Scalar", "masked_fill_.Tensor"}},
    {Rule::Meta,
     {"where.self_out", "isneginf.out", "isposinf.out", "add.out", "sub.out", "mul.out", "div.out", "clamp", "clamp_", "clamp_min", "clamp_max",
      "mm.out", "addmm.out", "bmm.out", "baddbmm", "dot", "mv", "_softmax", "_log_softmax",
      "sum.dim_IntList", "sum", "mean.dim", "mean", "prod.dim_int", "amax", "amin", "argmax", "argmin", "max", "min",
      "max.dim", "min.dim", "any", "any.dim", "all", "all.dim", "cumsum", "norm.ScalarOpt_dim", "linalg_vector_norm",
      "topk", "sort", "sort.stable", "gather", "scatter.src", "scatter.value", "scatter_.src", "scatter_.value",
      "scatter_add", "scatter_add_", "index.Tensor", "index_select", "index_add", "index_add_", "index_copy_",
      "_index_put_impl_", "cat.out", "arange.start_out", "tril", "triu", "flip", "roll"}},
  };
  return all;
}
// clang-format on

}  // namespace sim
