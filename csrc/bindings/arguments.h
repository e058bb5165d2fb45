// How kernels' params are filled from tensors: data_ptr(), dtype and stride() of whatever object is given.
//
// Only this file and the two that include it know Python. No torch header, and no particular torch, is
// needed to build them.
#pragma once

#include <pybind11/pybind11.h>

#include "search.h"

#include <string>

namespace fm::python {

namespace py = pybind11;
using Tensor = const py::object&;

// A tensor's memory, null for None.
struct Address {
    void* data;
    Address(const py::object& tensor) : data(nullptr) { // NOLINT: implicit on purpose
        if (!tensor.is_none()) data = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    }
    template <class T> operator T*() const { return static_cast<T*>(data); }
};

inline Dtype dtype_of(const py::object& tensor) {
    static const py::module_ torch = py::module_::import("torch"); // NOLINT: lives as long as the interpreter
    static const PyObject* types[] = {torch.attr("float32").ptr(), torch.attr("float64").ptr(),
                                      torch.attr("float16").ptr(), torch.attr("bfloat16").ptr(),
                                      torch.attr("int8").ptr()};
    py::object dtype = tensor.attr("dtype");
    for (int k = 0; k < 5; ++k)
        if (dtype.ptr() == types[k]) return static_cast<Dtype>(k);
    throw py::type_error("fused_margin: unsupported dtype " + py::str(dtype).cast<std::string>());
}

inline MatrixView view_of(const py::object& tensor) {
    return {Address(tensor).data, dtype_of(tensor), tensor.attr("stride")(0).cast<int64_t>(),
            tensor.attr("stride")(1).cast<int64_t>()};
}

inline Scalar scalar_of(const py::object& value) {
    if (py::isinstance<py::float_>(value) || py::isinstance<py::int_>(value)) return {nullptr, value.cast<double>()};
    return {Address(value), 0.0};
}

void define_tensor_kernels(py::module_ cuda); // the families, as submodules, and what stands around them

} // namespace fm::python
