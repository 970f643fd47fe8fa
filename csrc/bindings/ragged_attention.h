// ragged_attention as Python calls it, the same for _cpu and _cuda up to the last arguments, which say where it runs.
#pragma once
#include <pybind11/pybind11.h>

#include <tuple>

#include "bindings/integers.h"
#include "core/params.h"

namespace exeunt {

namespace py = pybind11;

// (address, strides...) of a tensor, in elements; address 0 means "not given".
using Strided = Integers<4>;

inline CacheArg cache_arg(const Strided& c) {
  const auto [data, row, head, slot] = c.of;
  return {address(data), row, head, slot};
}

// def("ragged_attention", run(params, last...)); `last_names` are the py::arg of what follows the parameters. `q` and
// `pages` have two strides; lists are addresses of int64.
template <class... Last, class... Names>
void def_ragged_attention(py::module_& m, void (*run)(RaggedAttentionParams&, Last...), const Names&... last_names) {
  const auto call = [run](const Strided& q, const Strided& keys, const Strided& values, int dtype,
                          const Integers<7>& shape, uintptr_t q_indptr, uintptr_t rows, uintptr_t kv_len,
                          uintptr_t kv_start, uintptr_t positions, int64_t entries, uintptr_t count, bool count_64,
                          bool causal, int64_t window, float softcap, float scale, uintptr_t alibi, const Strided& bias,
                          int bias_dtype, int64_t bias_keys, const Strided& pages, int64_t page_rows,
                          int64_t page_columns, uintptr_t out, uintptr_t workspace, Last... last) {
    const auto list = [](uintptr_t address) { return reinterpret_cast<const int64_t*>(address); };
    RaggedAttentionParams p{};
    p.q = address(q.of[0]);
    p.q_token = q.of[1];
    p.q_head = q.of[2];
    p.keys = cache_arg(keys);
    p.values = cache_arg(values);
    p.dtype = static_cast<DType>(dtype);
    std::tie(p.tokens, p.heads, p.kv_heads, p.size, p.value_size, p.rows_held, p.slots) = std::tuple_cat(shape.of);
    p.entries = p.live = entries;
    p.count = reinterpret_cast<const void*>(count);
    p.count_64 = count_64;
    p.q_indptr = list(q_indptr);
    p.rows = list(rows);
    p.kv_len = list(kv_len);
    p.kv_start = list(kv_start);
    p.positions = list(positions);
    p.causal = causal;
    p.window = window;
    p.softcap = softcap;
    p.scale = scale;
    p.alibi = reinterpret_cast<const float*>(alibi);
    p.bias = address(bias.of[0]);
    p.bias_token = bias.of[1];
    p.bias_head = bias.of[2];
    p.bias_key = bias.of[3];
    p.bias_dtype = static_cast<DType>(bias_dtype);
    p.bias_keys = bias_keys;
    p.pages = address<const int32_t>(pages.of[0]);
    p.page_row = pages.of[1];
    p.page_column = pages.of[2];
    p.page_rows = page_rows;
    p.page_columns = page_columns;
    p.out = reinterpret_cast<void*>(out);
    p.workspace = reinterpret_cast<void*>(workspace);
    py::gil_scoped_release release;
    run(p, last...);
  };
  m.def("ragged_attention", call, py::arg("q"), py::arg("keys"), py::arg("values"), py::arg("dtype"), py::arg("shape"),
        py::arg("q_indptr"), py::arg("rows"), py::arg("kv_len"), py::arg("kv_start"), py::arg("positions"),
        py::arg("entries"), py::arg("count"), py::arg("count_64"), py::arg("causal"), py::arg("window"),
        py::arg("softcap"), py::arg("scale"), py::arg("alibi"), py::arg("bias"), py::arg("bias_dtype"),
        py::arg("bias_keys"), py::arg("pages"), py::arg("page_rows"), py::arg("page_columns"), py::arg("out"),
        py::arg("workspace"), last_names..., "Attention over ragged rows; see exeunt.ops.ragged_attention.");
}

}  // namespace exeunt
