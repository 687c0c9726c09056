// Operators that run on the device's own stream; every other one goes to the host and is counted.
#pragma once

namespace sim {

// clang-format off
inline constexpr const char* kNative[] = {
    "add.Tensor", "add_.Tensor", "add.out", "sub.Tensor", "sub_.Tensor", "sub.out", "rsub.Scalar",
    "mul.Tensor", "mul_.Tensor", "mul.out", "div.Tensor", "div_.Tensor", "div.out", "div.Tensor_mode", "div_.Tensor_mode",
    "remainder.Tensor", "remainder.Scalar", "floor_divide", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow_.Scalar",
    "neg", "abs", "exp", "exp_", "log", "cos", "sin", "sqrt", "rsqrt", "rsqrt_", "reciprocal", "sigmoid", "sigmoid_",
    "tanh", "erf", "silu", "silu_", "gelu", "relu", "relu_", "floor", "ceil", "round", "sign", "isnan", "clamp", "clamp_",
    "clamp_min", "clamp_max", "maximum", "minimum", "fill_.Scalar", "fill_.Tensor", "zero_",
    "eq.Tensor", "eq.Scalar", "ne.Tensor", "ne.Scalar", "lt.Tensor", "lt.Scalar", "le.Tensor", "le.Scalar",
    "gt.Tensor", "gt.Scalar", "ge.Tensor", "ge.Scalar", "logical_not", "logical_and", "logical_or",
    "bitwise_and.Tensor", "bitwise_and_.Tensor", "bitwise_or.Tensor", "bitwise_or_.Tensor", "bitwise_not",
    "bitwise_and.Scalar", "bitwise_right_shift.Tensor", "bitwise_right_shift.Tensor_Scalar", "bitwise_left_shift.Tensor",
    "mm", "mm.out", "addmm", "addmm.out", "bmm", "bmm.out", "baddbmm", "dot", "mv",
    "_softmax", "_log_softmax", "sum.dim_IntList", "sum", "mean.dim", "mean", "prod.dim_int", "amax", "amin", "argmax",
    "argmin", "max", "min", "max.dim", "min.dim", "any", "any.dim", "all", "all.dim", "cumsum", "norm.ScalarOpt_dim",
    "linalg_vector_norm", "topk", "sort", "sort.stable", "gather", "scatter.src", "scatter.value", "scatter_.src",
    "scatter_.value", "scatter_add", "scatter_add_", "index.Tensor", "index_select", "index_add", "index_add_",
    "index_copy_", "_index_put_impl_", "masked_fill_.Scalar", "masked_fill_.Tensor", "where.self", "cat", "cat.out",
    "arange.start_out", "tril", "triu", "flip", "roll", "embedding",
};
// clang-format on

}  // namespace sim
