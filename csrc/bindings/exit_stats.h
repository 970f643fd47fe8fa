// exit_stats as Python calls it, the same for _cpu and _cuda up to the last arguments, which say where it runs.
#pragma once
#include <pybind11/pybind11.h>

#include "bindings/integers.h"
#include "core/params.h"

namespace exeunt {

namespace py = pybind11;

// (address, dtype, stride) of an optional vector; address 0 means "not given".
using Vector = Integers<3>;

inline VectorArg vector_arg(const Vector& v) {
  const auto [data, dtype, stride] = v.of;
  return {address(data), static_cast<DType>(dtype), stride};
}

// (address, dtype, form, tile stride, row stride, line stride, address of scales) of a weight; strides in bytes.
using Weight = Integers<7>;

inline WeightArg weight_arg(const Weight& w) {
  const auto [data, dtype, form, tile_stride, row_stride, line_stride, scale] = w.of;
  return {address(data), static_cast<DType>(dtype),  static_cast<WeightForm>(form), tile_stride, row_stride,
          line_stride,   address<const float>(scale)};
}

// def("exit_stats", run(params, last...)); `last_names` are the py::arg of what follows the parameters.
template <class... Last, class... Names>
void def_exit_stats(py::module_& m, void (*run)(const ExitStatsParams&, Last...), const Names&... last_names) {
  const auto call = [run](uintptr_t hidden, int hidden_dtype, int64_t hidden_stride, int64_t hidden_rows,
                          const Weight& head, int64_t head_rows, int64_t rows, int64_t vocab, int64_t width,
                          uintptr_t row_list, bool row_list_64, uintptr_t count, bool count_64, const Vector& head_bias,
                          int norm, const Vector& norm_weight, const Vector& norm_bias, float eps, float scale,
                          float softcap, float temperature, uintptr_t logits_out, int logits_dtype,
                          int64_t logits_stride, bool entropy, uintptr_t columns, uintptr_t target,
                          uintptr_t target_out, int topk, uintptr_t topk_logits, uintptr_t topk_ids, uintptr_t seeds,
                          uintptr_t sample, uintptr_t argmax, uintptr_t top1, uintptr_t top2, uintptr_t sumexp,
                          uintptr_t weighted, uintptr_t workspace, Last... last) {
    ExitStatsParams p{};
    p.hidden = reinterpret_cast<const void*>(hidden);
    p.hidden_dtype = static_cast<DType>(hidden_dtype);
    p.hidden_stride = hidden_stride;
    p.hidden_rows = hidden_rows;
    p.head = weight_arg(head);
    p.head_rows = head_rows;
    p.rows = rows;
    p.vocab = vocab;
    p.width = width;
    p.row_list = reinterpret_cast<const void*>(row_list);
    p.row_list_64 = row_list_64;
    p.count = reinterpret_cast<const void*>(count);
    p.count_64 = count_64;
    p.head_bias = vector_arg(head_bias);
    p.norm = {static_cast<Norm>(norm), vector_arg(norm_weight), vector_arg(norm_bias), eps};
    p.scale = scale;
    p.softcap = softcap;
    p.temperature = temperature;
    p.logits_out = reinterpret_cast<void*>(logits_out);
    p.logits_dtype = static_cast<DType>(logits_dtype);
    p.logits_stride = logits_stride;
    p.entropy = entropy;
    p.columns = reinterpret_cast<const int64_t*>(columns);
    p.target = reinterpret_cast<const int64_t*>(target);
    p.target_out = reinterpret_cast<float*>(target_out);
    p.topk = topk;
    p.topk_logits = reinterpret_cast<float*>(topk_logits);
    p.topk_ids = reinterpret_cast<int64_t*>(topk_ids);
    p.seeds = reinterpret_cast<const int64_t*>(seeds);
    p.sample = reinterpret_cast<int64_t*>(sample);
    p.argmax = reinterpret_cast<int64_t*>(argmax);
    p.top1 = reinterpret_cast<float*>(top1);
    p.top2 = reinterpret_cast<float*>(top2);
    p.sumexp = reinterpret_cast<float*>(sumexp);
    p.weighted = reinterpret_cast<float*>(weighted);
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, last...);
  };
  m.def("exit_stats", call, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"),
        py::arg("hidden_rows"), py::arg("head"), py::arg("head_rows"), py::arg("rows"), py::arg("vocab"),
        py::arg("width"), py::arg("row_list"), py::arg("row_list_64"), py::arg("count"), py::arg("count_64"),
        py::arg("head_bias"), py::arg("norm"), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("eps"),
        py::arg("scale"), py::arg("softcap"), py::arg("temperature"), py::arg("logits_out"), py::arg("logits_dtype"),
        py::arg("logits_stride"), py::arg("entropy"), py::arg("columns"), py::arg("target"), py::arg("target_out"),
        py::arg("topk"), py::arg("topk_logits"), py::arg("topk_ids"), py::arg("seeds"), py::arg("sample"),
        py::arg("argmax"), py::arg("top1"), py::arg("top2"), py::arg("sumexp"), py::arg("weighted"),
        py::arg("workspace"), last_names..., "Fused norm, head and online softmax; see exeunt.ops.exit_stats.");
}

}  // namespace exeunt
