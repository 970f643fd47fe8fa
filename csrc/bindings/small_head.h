// small_head and saturation, and what a layer is, as both modules take them.
#pragma once
#include "bindings/exit_stats.h"

namespace exeunt {

// (outputs, inputs, activation; address, dtype and row stride of the weight; address, dtype and stride of the bias) of
// a layer, strides in elements; outputs 0 means "not given".
using Layer = Integers<9>;

inline LayerArg layer_arg(const Layer& l) {
  const auto [outputs, inputs, activation, weight, dtype, row, bias, bias_dtype, bias_stride] = l.of;
  LayerArg layer{{}, vector_arg({bias, bias_dtype, bias_stride}), outputs, inputs, static_cast<Activation>(activation)};
  layer.weight.data = address(weight);  // read row by row: what tiles need stays 0
  layer.weight.dtype = static_cast<DType>(dtype);
  layer.weight.row_stride = row * element_bytes(layer.weight.dtype);
  return layer;
}

inline SmallHeadParams small_head_params(uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t rows,
                                         int64_t width, const Layer& pooler, const Layer& head, uintptr_t out) {
  SmallHeadParams p{};
  p.hidden = reinterpret_cast<const void*>(hidden);
  p.hidden_dtype = static_cast<DType>(hidden_dtype);
  p.hidden_stride = hidden_stride;
  p.rows = rows;
  p.width = width;
  p.tokens = 1;
  p.pooler = layer_arg(pooler);
  p.pooled = p.pooler.outputs > 0;
  p.head = layer_arg(head);
  p.out = reinterpret_cast<float*>(out);
  return p;
}

// def("small_head", run(params, last...)); `last_names` are the py::arg of what follows the parameters.
template <class... Last, class... Names>
void def_small_head(py::module_& m, void (*run)(SmallHeadParams&, Last...), const Names&... last_names) {
  const auto call = [run](uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t rows, int64_t width,
                          int norm, const Vector& norm_weight, const Vector& norm_bias, float eps, const Layer& pooler,
                          const Layer& head, uintptr_t out, Last... last) {
    SmallHeadParams p = small_head_params(hidden, hidden_dtype, hidden_stride, rows, width, pooler, head, out);
    p.norm = {static_cast<Norm>(norm), vector_arg(norm_weight), vector_arg(norm_bias), eps};
    py::gil_scoped_release release;
    run(p, last...);
  };
  m.def("small_head", call, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"), py::arg("rows"),
        py::arg("width"), py::arg("norm"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("eps"),
        py::arg("pooler"), py::arg("head"), py::arg("out"), last_names...,
        "Fused norm, pooler and head of few classes; see exeunt.ops.small_head.");
}

// Likewise.
template <class... Last, class... Names>
void def_saturation(py::module_& m, void (*run)(const SaturationParams&, Last...), const Names&... last_names) {
  const auto call = [run](uintptr_t a, int a_dtype, int64_t a_stride, uintptr_t b, int b_dtype, int64_t b_stride,
                          int64_t rows, int64_t width, uintptr_t out, Last... last) {
    py::gil_scoped_release release;
    run({reinterpret_cast<const void*>(a), reinterpret_cast<const void*>(b), static_cast<DType>(a_dtype),
         static_cast<DType>(b_dtype), a_stride, b_stride, rows, width, reinterpret_cast<float*>(out)},
        last...);
  };
  m.def("saturation", call, py::arg("a"), py::arg("a_dtype"), py::arg("a_stride"), py::arg("b"), py::arg("b_dtype"),
        py::arg("b_stride"), py::arg("rows"), py::arg("width"), py::arg("out"), last_names...,
        "Cosine of pairs of rows; see exeunt.ops.saturation.");
}

}  // namespace exeunt
