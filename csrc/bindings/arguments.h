// Conversion of Python arguments to the fields of params structs: data_ptr(), dtype and stride() of any tensor-like
// object.
//
// Only the bindings know Python. They need no torch header and build for any version of torch.
#pragma once

#include <pybind11/pybind11.h>

#include "../kernels/loss.h"
#include "../kernels/search.h"
#include "../kernels/step.h"
#include "../kernels/tensor.h"

#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace fm::python {

namespace py = pybind11;

inline std::string text(py::handle object) { return py::str(object).cast<std::string>(); }
inline std::string type_name(py::handle object) { return text(py::type::handle_of(object).attr("__name__")); }

// The keyword that is being read, for the errors.
struct Name {
    const char* function;
    const char* keyword;

    [[noreturn]] void fail(const std::string& expected, py::handle found) const {
        PyErr_Clear();
        throw py::type_error(
            std::string(function) + ": " + keyword + ": expected " + expected + ", got " +
            (py::hasattr(found, "dtype") ? "a tensor of " + text(found.attr("dtype")) : type_name(found)));
    }
};

// Objects that every call needs. They live as long as the interpreter.
struct Torch {
    static constexpr const char* dtype_names[] = {"float32", "float64", "float16", "bfloat16",
                                                  "int8",    "int32",   "int64",   "bool"};
    static constexpr int kDtypes = 8;
    PyObject* dtypes[kDtypes]; // the first are in the order of Dtype
    PyObject *data_ptr, *dtype, *stride;

    static const Torch& get() {
        static const Torch torch; // NOLINT
        return torch;
    }

private:
    Torch()
        : data_ptr(PyUnicode_InternFromString("data_ptr")), dtype(PyUnicode_InternFromString("dtype")),
          stride(PyUnicode_InternFromString("stride")) {
        py::module_ torch = py::module_::import("torch");
        for (int k = 0; k < kDtypes; ++k) dtypes[k] = py::object(torch.attr(dtype_names[k])).release().ptr();
    }
};

// The index of a tensor's dtype in Torch::dtypes, or -1 if the object has none of them.
inline int dtype_index(py::handle tensor) {
    const Torch& torch = Torch::get();
    auto dtype = py::reinterpret_steal<py::object>(PyObject_GetAttr(tensor.ptr(), torch.dtype));
    if (!dtype) PyErr_Clear();
    for (int k = 0; dtype && k < Torch::kDtypes; ++k)
        if (dtype.ptr() == torch.dtypes[k]) return k;
    return -1;
}

inline void* data_of(const Name& name, py::handle tensor) {
    auto address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(tensor.ptr(), Torch::get().data_ptr));
    if (!address) name.fail("a tensor", tensor);
    void* data = PyLong_AsVoidPtr(address.ptr());
    if (PyErr_Occurred()) throw py::error_already_set();
    return data;
}

// The torch dtype of the memory that a T* points to, as an index into Torch::dtypes; -1 for any dtype.
template <class T> constexpr int element_dtype = -1;
template <> inline constexpr int element_dtype<float> = 0;
template <> inline constexpr int element_dtype<double> = 1;
template <> inline constexpr int element_dtype<uint16_t> = 2;
template <> inline constexpr int element_dtype<int8_t> = 4;
template <> inline constexpr int element_dtype<int32_t> = 5;
template <> inline constexpr int element_dtype<int64_t> = 6;
template <> inline constexpr int element_dtype<unsigned long long> = 6;
template <> inline constexpr int element_dtype<bool> = 7;

// read(name, value, field) converts a Python value to the field, or throws a TypeError with the name.

template <class T> void read(const Name& name, py::handle value, T*& field) {
    field = nullptr;
    if (value.is_none()) return;
    constexpr int dtype = element_dtype<std::remove_const_t<T>>;
    if (dtype >= 0 && dtype_index(value) != dtype)
        name.fail(std::string("a tensor of torch.") + Torch::dtype_names[dtype < 0 ? 0 : dtype] + " or None", value);
    field = static_cast<T*>(data_of(name, value));
}

inline void read(const Name& name, py::handle value, bool& field) {
    if (!PyBool_Check(value.ptr())) name.fail("a bool", value);
    field = value.ptr() == Py_True;
}

inline void read(const Name& name, py::handle value, int64_t& field) {
    field = PyLong_Check(value.ptr()) ? PyLong_AsLongLong(value.ptr()) : -1;
    if (field == -1 && (!PyLong_Check(value.ptr()) || PyErr_Occurred())) name.fail("an int of 64 bits", value);
}

inline void read(const Name& name, py::handle value, int& field) {
    int64_t wide;
    read(name, value, wide);
    field = static_cast<int>(wide);
    if (field != wide) name.fail("an int of 32 bits", value);
}

inline void read(const Name& name, py::handle value, BeyondPi& field) {
    int number;
    read(name, value, number);
    field = static_cast<BeyondPi>(number);
}

inline void read(const Name& name, py::handle value, UpdateRule& field) {
    int number;
    read(name, value, number);
    field = static_cast<UpdateRule>(number);
}

inline bool is_number(py::handle value) { return PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr()); }

inline void read(const Name& name, py::handle value, double& field) {
    if (!is_number(value)) name.fail("a float", value);
    field = PyFloat_AsDouble(value.ptr());
    if (PyErr_Occurred()) name.fail("a float", value);
}

inline void read(const Name& name, py::handle value, Scalar& field) {
    field = {nullptr, 0.0};
    if (is_number(value))
        read(name, value, field.value);
    else if (value.is_none())
        name.fail("a float or a tensor of torch.float64", value);
    else
        read(name, value, field.values);
}

inline void read(const Name& name, py::handle value, OptionalNumber& field) {
    field = {!value.is_none(), 0.0};
    if (field.given) read(name, value, field.value);
}

inline void read(const Name& name, py::handle value, Address& field) {
    if (!PyLong_Check(value.ptr())) name.fail("an address", value);
    field = {static_cast<int64_t*>(PyLong_AsVoidPtr(value.ptr()))};
    if (PyErr_Occurred()) throw py::error_already_set();
}

inline int64_t item(py::handle numbers, Py_ssize_t k) { return PyLong_AsLongLong(PyTuple_GetItem(numbers.ptr(), k)); }

inline void read(const Name& name, py::handle value, MatrixView& field) {
    int dtype = dtype_index(value);
    if (dtype < 0 || dtype > static_cast<int>(Dtype::int8)) name.fail("a matrix of floats or int8", value);
    auto strides = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value.ptr(), Torch::get().stride));
    if (!strides || !PyTuple_Check(strides.ptr()) || PyTuple_Size(strides.ptr()) != 2) name.fail("a matrix", value);
    field = {data_of(name, value), static_cast<Dtype>(dtype), item(strides, 0), item(strides, 1)};
}

inline void read(const Name& name, py::handle value, MutableRows& field) {
    field = {};
    if (value.is_none()) return;
    int dtype = dtype_index(value);
    if (dtype < 0 || dtype > static_cast<int>(Dtype::bfloat16)) name.fail("a matrix of floats or None", value);
    field = {data_of(name, value), static_cast<Dtype>(dtype)};
}

// The shape of a contiguous matrix.
inline std::pair<int64_t, int64_t> shape_of(const Name& name, py::handle matrix) {
    auto shape = py::reinterpret_steal<py::object>(PyObject_GetAttrString(matrix.ptr(), "shape"));
    if (!shape || !PyTuple_Check(shape.ptr()) || PyTuple_Size(shape.ptr()) != 2) name.fail("a matrix", matrix);
    return {item(shape, 0), item(shape, 1)};
}

inline void read(const Name& name, py::handle value, Scores& field) {
    int dtype = dtype_index(value);
    field.type = dtype == element_dtype<int32_t> ? Scores::int32
                 : dtype == element_dtype<float> ? Scores::float32
                                                 : Scores::float64;
    if (field.type == Scores::float64 && dtype != element_dtype<double>)
        name.fail("a matrix of torch.int32, torch.float32 or torch.float64", value);
    field.data = data_of(name, value);
    std::tie(field.rows, field.columns) = shape_of(name, value);
}

// Reads the fields of a tuple in order.
template <class... Fields> void read_tuple(const Name& name, py::handle value, Fields&... fields) {
    constexpr Py_ssize_t count = sizeof...(fields);
    if (!PyTuple_Check(value.ptr()) || PyTuple_Size(value.ptr()) != count)
        name.fail("a tuple of " + std::to_string(count), value);
    Py_ssize_t k = 0;
    (read(name, PyTuple_GetItem(value.ptr(), k++), fields), ...);
}

inline void read(const Name& name, py::handle value, QuantizedRows& field) {
    read_tuple(name, value, field.rows, field.inverse_norm, field.scale, field.norm, field.length, field.error);
}

inline void read(const Name& name, py::handle value, CandidateLists& field) {
    field = {};
    if (value.is_none()) return;
    read_tuple(name, value, field.candidate, field.value, field.upper_bound, field.count);
    field.capacity = shape_of(name, PyTuple_GetItem(value.ptr(), 0)).second;
}

inline void read(const Name& name, py::handle value, Nearest& field) {
    field = {};
    if (value.is_none()) return;
    read_tuple(name, value, field.cosine, field.index);
    field.count = shape_of(name, PyTuple_GetItem(value.ptr(), 0)).second;
}

} // namespace fm::python
