// Python's view of the search's kernels, for both backends.
//
// Arguments are trusted, as everywhere; structs that several kernels share come as tuples of tensors.
#pragma once

#include "python.h"

namespace fm::python {

inline int64_t columns_of(const py::object& matrix) { return py::tuple(matrix.attr("shape"))[1].cast<int64_t>(); }

inline Coded coded_of(const py::tuple& t) { // rows, inverse_norm, scale, norm, length, error
    return {view_of(t[0]), Address(t[1]), Address(t[2]), Address(t[3]), Address(t[4]), Address(t[5])};
}

inline Lists lists_of(const py::object& value) { // candidate, value, ceiling; or None
    if (value.is_none()) return {nullptr, nullptr, nullptr, 0};
    py::tuple t = value;
    return {Address(t[0]), Address(t[1]), Address(t[2]), columns_of(t[0])};
}

inline Answers answers_of(const py::object& value) { // cosine, index; or None
    if (value.is_none()) return {nullptr, nullptr, 0};
    py::tuple t = value;
    return {Address(t[0]), Address(t[1]), columns_of(t[0])};
}

inline ProductTile tile_of(Tensor products, Tensor row_place, int64_t row_begin, Tensor row_number,
                           int64_t column_begin, int64_t column_first, bool one_set) {
    static const py::object int32 = py::module_::import("torch").attr("int32"); // NOLINT: lives as long as Python
    py::object dtype = products.attr("dtype");
    ProductTile::Type type = ProductTile::integer;
    if (!dtype.is(int32)) type = dtype_of(products) == Dtype::float64 ? ProductTile::twice : ProductTile::single;
    py::tuple shape = products.attr("shape");
    return {Address(products).data, type,      shape[0].cast<int64_t>(), shape[1].cast<int64_t>(),
            Address(row_place),     row_begin, Address(row_number),      column_begin,
            column_first,           one_set};
}

template <class Backend, class P> void run_without_gil(const P& p, uintptr_t stream) {
    py::gil_scoped_release release;
    Backend::run(p, stream);
}

template <class Backend> void define_search_kernels(py::module_ m) {
    m.def(
        "encode_rows",
        [](uintptr_t stream, Tensor rows, Tensor selected, bool inner_product, Tensor code, Tensor scale, int64_t count,
           int64_t size) {
            run_without_gil<Backend>(
                EncodeRows{view_of(rows), Address(selected), inner_product, Address(code), Address(scale), count, size},
                stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("rows"), py::arg("selected"), py::arg("inner_product"),
        py::arg("code"), py::arg("scale"), py::arg("count"), py::arg("size"));

    m.def(
        "measure_codes",
        [](uintptr_t stream, Tensor rows, Tensor code, Tensor scale, bool inner_product, double rounding,
           Tensor inverse_norm, Tensor norm, Tensor length, Tensor error, int64_t count, int64_t size) {
            run_without_gil<Backend>(MeasureCodes{view_of(rows), view_of(code), Address(scale), inner_product, rounding,
                                                  Address(inverse_norm), Address(norm), Address(length), Address(error),
                                                  count, size},
                                     stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("rows"), py::arg("code"), py::arg("scale"), py::arg("inner_product"),
        py::arg("rounding"), py::arg("inverse_norm"), py::arg("norm"), py::arg("length"), py::arg("error"),
        py::arg("count"), py::arg("size"));

    m.def(
        "offer_tile",
        [](uintptr_t stream, Tensor products, Tensor row_place, int64_t row_begin, Tensor row_number,
           int64_t column_begin, int64_t column_first, bool one_set, Tensor row_scale, Tensor column_scale,
           const py::object& of_rows, const py::object& of_columns, Tensor renewed) {
            run_without_gil<Backend>(
                OfferTile{tile_of(products, row_place, row_begin, row_number, column_begin, column_first, one_set),
                          Address(row_scale), Address(column_scale), lists_of(of_rows), lists_of(of_columns),
                          Address(renewed)},
                stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("products"), py::arg("row_place"), py::arg("row_begin"),
        py::arg("row_number"), py::arg("column_begin"), py::arg("column_first"), py::arg("one_set"),
        py::arg("row_scale"), py::arg("column_scale"), py::arg("of_rows"), py::arg("of_columns"), py::arg("renewed"));

    m.def(
        "forget_renewed",
        [](uintptr_t stream, const py::object& lists, Tensor renewed_rows, Tensor renewed_candidates, int64_t count) {
            run_without_gil<Backend>(
                ForgetRenewed{lists_of(lists), Address(renewed_rows), Address(renewed_candidates), count}, stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("lists"), py::arg("renewed_rows"), py::arg("renewed_candidates"),
        py::arg("count"));

    m.def(
        "settle_candidates",
        [](uintptr_t stream, const py::tuple& query, const py::tuple& reference, const py::object& lists,
           const py::object& answers, Tensor reference_place, int64_t reference_first, int64_t references,
           int64_t query_first, bool one_set, int64_t queries, int64_t size) {
            run_without_gil<Backend>(SettleCandidates{coded_of(query), coded_of(reference), lists_of(lists),
                                                      answers_of(answers), Address(reference_place), reference_first,
                                                      references, query_first, one_set, queries, size},
                                     stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("query"), py::arg("reference"), py::arg("lists"), py::arg("answers"),
        py::arg("reference_place"), py::arg("reference_first"), py::arg("references"), py::arg("query_first"),
        py::arg("one_set"), py::arg("queries"), py::arg("size"));

    m.def(
        "resolve_tile",
        [](uintptr_t stream, Tensor products, Tensor row_place, int64_t row_begin, Tensor row_number,
           int64_t column_begin, int64_t column_first, bool one_set, const py::tuple& query, const py::tuple& reference,
           const py::object& of_rows, const py::object& of_columns, Tensor renewed, int64_t size) {
            run_without_gil<Backend>(
                ResolveTile{tile_of(products, row_place, row_begin, row_number, column_begin, column_first, one_set),
                            coded_of(query), coded_of(reference), answers_of(of_rows), answers_of(of_columns),
                            Address(renewed), size},
                stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("products"), py::arg("row_place"), py::arg("row_begin"),
        py::arg("row_number"), py::arg("column_begin"), py::arg("column_first"), py::arg("one_set"), py::arg("query"),
        py::arg("reference"), py::arg("of_rows"), py::arg("of_columns"), py::arg("renewed"), py::arg("size"));
}

} // namespace fm::python
