// Makes a Python function from a params struct: function(stream, *, one keyword per field).
//
// Python has checked shapes and values. Here a missing, unknown or ill-typed keyword is a TypeError that names it.
#pragma once

#include "arguments.h"
#include "fields.h"

#include <array>
#include <utility>

namespace fm::python {

// Whether P is a struct whose fields are listed in fields.h.
struct IgnoreField {
    template <class Field> constexpr void operator()(const char*, Field&) const {}
};
template <class P, class = void> constexpr bool has_fields = false;
template <class P> constexpr bool has_fields<P, decltype(for_each_field(std::declval<P&>(), IgnoreField{}))> = true;

// Calls visit(name, field) for the fields of a struct and of the structs in it.
template <class P, class Visit> constexpr void for_each_keyword(P& p, Visit& visit) {
    for_each_field(p, [&](const char* name, auto& field) {
        if constexpr (has_fields<std::decay_t<decltype(field)>>)
            for_each_keyword(field, visit);
        else
            visit(name, field);
    });
}

struct Count {
    size_t value = 0;
    template <class Field> constexpr void operator()(const char*, Field&) { ++value; }
};
template <class P> constexpr size_t field_count() {
    P p{};
    Count count;
    for_each_field(p, count);
    return count.value;
}
template <class P> constexpr size_t keyword_count() {
    P p{};
    Count count;
    for_each_keyword(p, count);
    return count.value;
}

// Whether P has at least as many fields as there are indices.
struct AnyField {
    template <class Field> constexpr operator Field() const;
};
template <class P, size_t... I> constexpr auto takes(std::index_sequence<I...>)
    -> decltype(P{(static_cast<void>(I), AnyField{})...}, true) {
    return true;
}
template <class P> constexpr bool takes(...) { return false; }
template <class P> constexpr bool lists_every_field() {
    return takes<P>(std::make_index_sequence<field_count<P>()>{}) &&
           !takes<P>(std::make_index_sequence<field_count<P>() + 1>{});
}

// The keywords of one function, as interned strings, which live as long as the interpreter. `compute` is an additional
// keyword, unless it is a field too: the tensor whose dtype is the compute type.
template <class P> struct Keywords {
    static_assert(lists_every_field<P>(), "for_each_field does not list every field of the struct");

    const char* function;
    std::array<PyObject*, keyword_count<P>() + 1> names{};
    size_t count = 0;
    PyObject* compute = nullptr;

    explicit Keywords(const char* function, const char* compute_name = nullptr) : function(function) {
        P p{};
        auto add = [this](const char* name, auto&) { names[count++] = PyUnicode_InternFromString(name); };
        for_each_keyword(p, add);
        if (!compute_name) return;
        compute = PyUnicode_InternFromString(compute_name);
        if (!has(compute)) names[count++] = compute;
    }

    bool has(PyObject* name) const {
        for (size_t k = 0; k < count; ++k)
            if (PyUnicode_Compare(names[k], name) == 0) return true;
        return false;
    }

    PyObject* value(const py::kwargs& given, PyObject* name) const {
        PyObject* found = PyDict_GetItemWithError(given.ptr(), name);
        if (!found) fail(given);
        return found;
    }

    // Fills a struct, P or the same for another compute type.
    template <class Params> void read_into(Params& p, const py::kwargs& given) const {
        if (given.size() != count) fail(given);
        size_t k = 0;
        auto read_field = [&](const char* name, auto& field) {
            read(Name{function, name}, value(given, names[k++]), field);
        };
        for_each_keyword(p, read_field);
    }

    [[noreturn]] void fail(const py::kwargs& given) const {
        std::string message;
        for (auto [name, _] : given)
            if (!has(name.ptr())) message += (message.empty() ? "unknown keyword " : ", unknown keyword ") + text(name);
        for (size_t k = 0; k < count; ++k)
            if (!PyDict_Contains(given.ptr(), names[k]))
                message += (message.empty() ? "missing keyword " : ", missing keyword ") + text(names[k]);
        throw py::type_error(std::string(function) + ": " + message);
    }

    std::string signature() const {
        std::string keywords;
        for (size_t k = 0; k < count; ++k) keywords += ", " + text(names[k]);
        return std::string(function) + "(stream, *" + keywords + ")";
    }
};

// Runs a kernel without the GIL.
template <class Backend, class Params, class Table>
void call(const Table& keywords, uintptr_t stream, const py::kwargs& given) {
    Params p{};
    keywords.read_into(p, given);
    py::gil_scoped_release release;
    Backend::run(p, stream);
}

template <class Backend, class P> void bind(py::module_ m, const char* function) {
    const Keywords<P> keywords(function);
    m.def(
        function, [keywords](uintptr_t stream, const py::kwargs& given) { call<Backend, P>(keywords, stream, given); },
        py::arg("stream"), keywords.signature().c_str());
}

// The same for a kernel with a compute type, which is the dtype of the argument `compute`.
template <class Backend, template <class> class P>
void bind_typed(py::module_ m, const char* function, const char* compute) {
    const Keywords<P<float>> keywords(function, compute);
    m.def(
        function,
        [keywords, compute](uintptr_t stream, const py::kwargs& given) {
            py::handle like = keywords.value(given, keywords.compute);
            switch (dtype_index(like)) {
            case element_dtype<float>: return call<Backend, P<float>>(keywords, stream, given);
            case element_dtype<double>: return call<Backend, P<double>>(keywords, stream, given);
            default: Name{keywords.function, compute}.fail("a tensor of torch.float32 or torch.float64", like);
            }
        },
        py::arg("stream"), keywords.signature().c_str());
}

} // namespace fm::python
