// Tuples of integers (addresses, strides, codes), which is how Python describes tensors to the kernels. pybind11's own
// tuples take a microsecond for thirty numbers, longer than a small head does.
#pragma once
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>

namespace exeunt {

template <std::size_t N>
struct Integers {
  std::array<int64_t, N> of;
};

template <class T = void>
T* address(int64_t integer) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(integer));
}

}  // namespace exeunt

template <std::size_t N>
struct pybind11::detail::type_caster<exeunt::Integers<N>> {
  PYBIND11_TYPE_CASTER(exeunt::Integers<N>, const_name("tuple[int, ...]"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != static_cast<Py_ssize_t>(N)) return false;
    for (std::size_t i = 0; i < N; ++i) {
      value.of[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), static_cast<Py_ssize_t>(i)));
      if (value.of[i] == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }
};
