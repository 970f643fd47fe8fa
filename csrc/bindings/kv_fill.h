// kv_fill as Python calls it: an object for a stack, so that a call brings only what changes.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "bindings/integers.h"
#include "core/params.h"

namespace exeunt {

namespace py = pybind11;

// What kv_fill is told about a stack once.
struct KvFill {
  KvFillParams p{};
  int64_t layers;

  KvFill(int64_t width, int64_t heads, int64_t head_size, int dtype, int norm, float eps, int key_norm, float key_eps,
         float shift, bool interleaved, int form, int64_t layers_, uintptr_t table)
      : layers(layers_) {
    p.width = width;
    p.heads = heads;
    p.head_size = head_size;
    p.dtype = static_cast<DType>(dtype);
    p.norm = static_cast<Norm>(norm);
    p.eps = eps;
    p.key_norm = static_cast<Norm>(key_norm);
    p.key_eps = key_eps;
    p.shift = shift;
    p.interleaved = interleaved;
    p.form = static_cast<WeightForm>(form);
    p.layers = reinterpret_cast<const KvLayer*>(table);
  }
};

// The rows of a call and the cache they go to: addresses of first layers, rows and slots, how many there are, until,
// rows of the cache, address of its slots by layer.
using KvRowsOf = Integers<7>;

// Class "KvFill" with fill(..., last...), which calls run(stack, params, last...), rows as Python has them;
// `last_names` are the py::arg of what follows the parameters. `tables` are pairs of addresses: none, one for all
// layers, or one a layer.
template <class... Last, class... Names>
py::class_<KvFill> def_kv_fill(py::module_& m, void (*run)(const KvFill&, KvFillParams&, Last...),
                               const Names&... last_names) {
  const auto fill = [run](const KvFill& self, uintptr_t hidden, int hidden_dtype, int64_t hidden_stride,
                          const KvRowsOf& rows, uintptr_t places, const std::vector<uintptr_t>& tables,
                          int tables_dtype, int64_t rotary, uintptr_t space, Last... last) {
    const auto [from_layer, batch_rows, slots, count, until, batch, capacities] = rows.of;
    KvFillParams p = self.p;
    p.hidden = reinterpret_cast<const void*>(hidden);
    p.hidden_dtype = static_cast<DType>(hidden_dtype);
    p.hidden_stride = hidden_stride;
    p.rows = count;
    p.rotary = rotary;
    p.from_layer = address<const int64_t>(from_layer);
    p.batch_rows = address<const int64_t>(batch_rows);
    p.slots = address<const int64_t>(slots);
    p.places = reinterpret_cast<const KvPlace*>(places);
    p.tables = tables.empty() ? nullptr : reinterpret_cast<const KvRotary*>(tables.data());
    p.one_table = tables.size() == 2;
    p.tables_dtype = static_cast<DType>(tables_dtype);
    p.until = until;
    p.batch = batch;
    p.capacities = address<const int64_t>(capacities);
    p.workspace = reinterpret_cast<void*>(space);
    run(self, p, last...);
  };
  // Local: both modules have one.
  return py::class_<KvFill>(m, "KvFill", py::module_local(), "kv_fill for one stack; see exeunt.ops.kv_fill.")
      .def(py::init<int64_t, int64_t, int64_t, int, int, float, int, float, float, bool, int, int64_t, uintptr_t>(),
           py::arg("width"), py::arg("heads"), py::arg("head_size"), py::arg("dtype"), py::arg("norm"), py::arg("eps"),
           py::arg("key_norm"), py::arg("key_eps"), py::arg("shift"), py::arg("interleaved"), py::arg("form"),
           py::arg("layers"), py::arg("table"))
      .def("fill", fill, py::arg("hidden"), py::arg("hidden_dtype"), py::arg("hidden_stride"), py::arg("rows"),
           py::arg("places"), py::arg("tables"), py::arg("tables_dtype"), py::arg("rotary"), py::arg("workspace"),
           last_names..., "Write the rows' keys and values.");
}

}  // namespace exeunt
