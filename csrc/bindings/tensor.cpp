// Python's view of the tensor-core kernels.
#include "python.h"

#include "cuda/tensor.h"

namespace fm::python {
namespace {

const uint16_t* half_of(Tensor tensor) { return Address(tensor); }
void* stream_of(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

template <class P> void launch(const P& p, uintptr_t stream) {
    py::gil_scoped_release release;
    cuda::run(p, stream_of(stream));
}

void define_helpers(py::module_ m) {
    m.attr("operand_scale") = cuda::kOperandScale;
    m.attr("probability_scale") = cuda::kProbabilityScale;
    m.def(
        "pack_operand",
        [](uintptr_t stream, Tensor rows, Tensor packed, Tensor inverse_norm, int64_t count, int64_t size,
           int64_t width, int parts) {
            launch(cuda::PackOperand{view_of(rows), Address(packed), Address(inverse_norm), count, size, width, parts},
                   stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("rows"), py::arg("packed"), py::arg("inverse_norm"), py::arg("count"),
        py::arg("size"), py::arg("width"), py::arg("parts"));
    m.def(
        "prepare_rows",
        [](uintptr_t stream, Tensor labels, Tensor scale, Tensor exponent, Tensor prepared, int64_t samples) {
            Scalar s = scalar_of(scale);
            void* rows = Address(prepared).data;
            launch(cuda::PrepareRows{Address(labels), s.values, s.value, Address(exponent),
                                     static_cast<cuda::TensorRow*>(rows), samples},
                   stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("labels"), py::arg("scale"), py::arg("exponent"), py::arg("prepared"),
        py::arg("samples"));
    m.def(
        "combine_partials",
        [](uintptr_t stream, Tensor partial, Tensor negative_logsumexp, Tensor exponent, int64_t slots,
           int64_t samples) {
            const void* sums = Address(partial).data;
            launch(cuda::CombinePartials{static_cast<const cuda::Partial*>(sums), Address(negative_logsumexp),
                                         Address(exponent), slots, samples},
                   stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("partial"), py::arg("negative_logsumexp"), py::arg("exponent"),
        py::arg("slots"), py::arg("samples"));
    m.def(
        "unpack_nearest",
        [](uintptr_t stream, Tensor best, Tensor index, int64_t count) {
            launch(cuda::UnpackNearest{Address(best), Address(index), count}, stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("best"), py::arg("index"), py::arg("count"));
}

// What a family of tensor-core kernels does, as a type to choose it by.
#define FM_FAMILY(Name, space)                                                                                         \
    struct Name {                                                                                                      \
        template <class P> static void run(const P& p, uintptr_t stream) {                                             \
            py::gil_scoped_release release;                                                                            \
            cuda::space::run(p, stream_of(stream));                                                                    \
        }                                                                                                              \
        static int slots() { return cuda::space::slots(); }                                                            \
    };
FM_FAMILY(Sm80, sm80)
#ifdef FM_SM90
FM_FAMILY(Sm90, sm90)
#endif
#undef FM_FAMILY

template <class Family> void define_family(py::module_ m) {
    m.def("slots", [](uintptr_t) { return Family::slots(); }, py::arg("stream"));
    m.def(
        "dump",
        [](uintptr_t stream, Tensor left, Tensor right, int64_t rows, int64_t columns, int64_t width, int parts,
           bool wide, Tensor out) {
            Family::run(
                cuda::TensorDump{{half_of(left), half_of(right), rows, columns, width, parts}, wide, Address(out)},
                stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("left"), py::arg("right"), py::arg("rows"), py::arg("columns"),
        py::arg("width"), py::arg("parts"), py::arg("wide"), py::arg("out"));
    m.def(
        "exponent_sum",
        [](uintptr_t stream, Tensor left, Tensor right, int64_t rows, int64_t columns, int64_t width, int parts,
           Tensor prepared, double scale_value, const py::object& fixed_exponent, int64_t class_begin, Tensor partial) {
            bool online = fixed_exponent.is_none();
            void *samples = Address(prepared).data, *sums = Address(partial).data;
            Family::run(cuda::TensorExponentSum{{half_of(left), half_of(right), rows, columns, width, parts},
                                                static_cast<const cuda::TensorRow*>(samples),
                                                online,
                                                scale_value,
                                                online ? 0.0 : fixed_exponent.cast<double>(),
                                                class_begin,
                                                static_cast<cuda::Partial*>(sums)},
                        stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("left"), py::arg("right"), py::arg("rows"), py::arg("columns"),
        py::arg("width"), py::arg("parts"), py::arg("prepared"), py::arg("scale_value"), py::arg("fixed_exponent"),
        py::arg("class_begin"), py::arg("partial"));
    m.def(
        "probabilities",
        [](uintptr_t stream, Tensor left, Tensor right, int64_t rows, int64_t columns, int64_t width, int parts,
           Tensor prepared, int64_t class_begin, Tensor probabilities, int64_t stride, int64_t low) {
            void* samples = Address(prepared).data;
            Family::run(cuda::TensorProbabilities{{half_of(left), half_of(right), rows, columns, width, parts},
                                                  static_cast<const cuda::TensorRow*>(samples),
                                                  class_begin,
                                                  Address(probabilities),
                                                  stride,
                                                  low},
                        stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("left"), py::arg("right"), py::arg("rows"), py::arg("columns"),
        py::arg("width"), py::arg("parts"), py::arg("prepared"), py::arg("class_begin"), py::arg("probabilities"),
        py::arg("stride"), py::arg("low"));
    m.def(
        "nearest",
        [](uintptr_t stream, Tensor left, Tensor right, int64_t rows, int64_t columns, int64_t width, int parts,
           int64_t row_begin, int64_t column_begin, Tensor best) {
            Family::run(cuda::TensorNearest{{half_of(left), half_of(right), rows, columns, width, parts},
                                            row_begin,
                                            column_begin,
                                            Address(best)},
                        stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("left"), py::arg("right"), py::arg("rows"), py::arg("columns"),
        py::arg("width"), py::arg("parts"), py::arg("row_begin"), py::arg("column_begin"), py::arg("best"));
}

} // namespace

void define_tensor_kernels(py::module_ m) {
    define_helpers(m);
    define_family<Sm80>(m.def_submodule("sm80"));
#ifdef FM_SM90
    define_family<Sm90>(m.def_submodule("sm90"));
#endif
}

} // namespace fm::python
