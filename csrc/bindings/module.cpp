// Python's view of the kernels: one function each, taking tensors, in submodules cpu and cuda.
//
// Arguments are trusted: fused_margin.ops is the only caller and has checked them.
#include "python.h"
#include "search_bindings.h"

#include "cpu/cpu.h"
#ifdef FM_CUDA
#include "cuda/cuda.h"
#endif

#ifndef FM_CUDA_ARCHITECTURES
#define FM_CUDA_ARCHITECTURES ""
#define FM_CUDA_TOOLKIT ""
#endif

using namespace fm;

namespace {

using namespace fm::python;

struct Cpu {
    template <class P> static void run(const P& p, uintptr_t) { cpu::run(p); }
};
#ifdef FM_CUDA
struct Cuda {
    template <class P> static void run(const P& p, uintptr_t stream) { cuda::run(p, reinterpret_cast<void*>(stream)); }
};
#endif

// Runs the kernel whose T is the dtype of `like`, without the GIL. make(T{}) fills its params.
template <class Backend, class Make> void run_as(const py::object& like, uintptr_t stream, Make make) {
    if (dtype_of(like) == Dtype::float64) {
        auto p = make(double{});
        py::gil_scoped_release release;
        Backend::run(p, stream);
    } else {
        auto p = make(float{});
        py::gil_scoped_release release;
        Backend::run(p, stream);
    }
}

template <class Backend> void define_kernels(py::module_ m) {
    m.def(
        "row_normalize",
        [](uintptr_t stream, Tensor rows, Tensor normalized, Tensor inverse_norm, int64_t count, int64_t size) {
            run_as<Backend>(inverse_norm, stream, [&](auto t) {
                return RowNormalize<decltype(t)>{view_of(rows), Address(normalized), Address(inverse_norm), count,
                                                 size};
            });
        },
        py::arg("stream"), py::kw_only(), py::arg("rows"), py::arg("normalized"), py::arg("inverse_norm"),
        py::arg("count"), py::arg("size"));

    m.def(
        "target_cosine",
        [](uintptr_t stream, Tensor compute_like, Tensor embeddings, Tensor weight, Tensor labels, Tensor cosine,
           Tensor row, uintptr_t bad_label, int64_t samples, int64_t classes, int64_t size, int64_t ignore_index,
           int64_t sub_centers, bool inner_product) {
            run_as<Backend>(compute_like, stream, [&](auto t) {
                return TargetCosine<decltype(t)>{view_of(embeddings),
                                                 view_of(weight),
                                                 Address(labels),
                                                 Address(cosine),
                                                 Address(row),
                                                 reinterpret_cast<int64_t*>(bad_label),
                                                 samples,
                                                 classes,
                                                 size,
                                                 ignore_index,
                                                 sub_centers,
                                                 inner_product};
            });
        },
        py::arg("stream"), py::kw_only(), py::arg("compute_like"), py::arg("embeddings"), py::arg("weight"),
        py::arg("labels"), py::arg("cosine"), py::arg("row"), py::arg("bad_label"), py::arg("samples"),
        py::arg("classes"), py::arg("size"), py::arg("ignore_index"), py::arg("sub_centers"), py::arg("inner_product"));

    m.def(
        "exponent_sum",
        [](uintptr_t stream, Tensor products, Tensor inverse_norm, Tensor bias, Tensor labels, Tensor hard_threshold,
           Tensor hard_strength, Tensor scale, const py::object& fixed_exponent, Tensor exponent, Tensor sum,
           int64_t samples, int64_t chunk, int64_t class_begin, int64_t sub_centers) {
            Scalar s = scalar_of(scale);
            bool fixed = !fixed_exponent.is_none();
            double k = fixed ? fixed_exponent.cast<double>() : 0.0;
            run_as<Backend>(products, stream, [&](auto t) {
                return ExponentSum<decltype(t)>{Address(products),
                                                Address(inverse_norm),
                                                Address(bias),
                                                Address(labels),
                                                Address(hard_threshold),
                                                Address(hard_strength),
                                                s.values,
                                                s.value,
                                                fixed,
                                                k,
                                                Address(exponent),
                                                Address(sum),
                                                samples,
                                                chunk,
                                                class_begin,
                                                sub_centers};
            });
        },
        py::arg("stream"), py::kw_only(), py::arg("products"), py::arg("inverse_norm"), py::arg("bias"),
        py::arg("labels"), py::arg("hard_threshold"), py::arg("hard_strength"), py::arg("scale"),
        py::arg("fixed_exponent"), py::arg("exponent"), py::arg("sum"), py::arg("samples"), py::arg("chunk"),
        py::arg("class_begin"), py::arg("sub_centers"));

    m.def(
        "margin_rows",
        [](uintptr_t stream, Tensor negative_logsumexp, Tensor target_cosine, Tensor uniform_cosine, Tensor labels,
           Tensor class_weight, Tensor scale, Tensor m1, Tensor m2, Tensor m3, Tensor annealing, int beyond_pi,
           bool easy, bool straight_through, double smallest_sine, double label_smoothing, Tensor class_weight_sum,
           Tensor loss, Tensor row_weight, Tensor derivatives, int64_t samples, int64_t classes, int64_t ignore_index) {
            MarginRows p{Address(negative_logsumexp),
                         Address(target_cosine),
                         Address(uniform_cosine),
                         Address(labels),
                         Address(class_weight),
                         scalar_of(scale),
                         scalar_of(m1),
                         scalar_of(m2),
                         scalar_of(m3),
                         scalar_of(annealing),
                         static_cast<BeyondPi>(beyond_pi),
                         easy,
                         straight_through,
                         smallest_sine,
                         label_smoothing,
                         Address(class_weight_sum),
                         Address(loss),
                         Address(row_weight),
                         Address(derivatives),
                         samples,
                         classes,
                         ignore_index};
            py::gil_scoped_release release;
            Backend::run(p, stream);
        },
        py::arg("stream"), py::kw_only(), py::arg("negative_logsumexp"), py::arg("target_cosine"),
        py::arg("uniform_cosine"), py::arg("labels"), py::arg("class_weight"), py::arg("scale"), py::arg("m1"),
        py::arg("m2"), py::arg("m3"), py::arg("annealing"), py::arg("beyond_pi"), py::arg("easy"),
        py::arg("straight_through"), py::arg("smallest_sine"), py::arg("label_smoothing"), py::arg("class_weight_sum"),
        py::arg("loss"), py::arg("row_weight"), py::arg("derivatives"), py::arg("samples"), py::arg("classes"),
        py::arg("ignore_index"));

    m.def(
        "project_weight_gradient",
        [](uintptr_t stream, Tensor gradient, Tensor weight, Tensor inverse_norm, Tensor dense_scale,
           Tensor normalized_embeddings, Tensor sorted_labels, Tensor label_order, Tensor target_gradient,
           Tensor uniform_direction, Tensor class_weight, Tensor nearest, Tensor sorted_nearest, Tensor nearest_order,
           Tensor nearest_gradient, int64_t samples, int64_t classes, int64_t size, int64_t class_begin, int64_t chunk,
           bool inner_product) {
            run_as<Backend>(gradient, stream, [&](auto t) {
                return ProjectWeightGradient<decltype(t)>{Address(gradient),
                                                          view_of(weight),
                                                          Address(inverse_norm),
                                                          Address(dense_scale),
                                                          Address(normalized_embeddings),
                                                          Address(sorted_labels),
                                                          Address(label_order),
                                                          Address(target_gradient),
                                                          Address(uniform_direction),
                                                          Address(class_weight),
                                                          Address(nearest),
                                                          Address(sorted_nearest),
                                                          Address(nearest_order),
                                                          Address(nearest_gradient),
                                                          samples,
                                                          classes,
                                                          size,
                                                          class_begin,
                                                          chunk,
                                                          inner_product};
            });
        },
        py::arg("stream"), py::kw_only(), py::arg("gradient"), py::arg("weight"), py::arg("inverse_norm"),
        py::arg("dense_scale"), py::arg("normalized_embeddings"), py::arg("sorted_labels"), py::arg("label_order"),
        py::arg("target_gradient"), py::arg("uniform_direction"), py::arg("class_weight"), py::arg("nearest"),
        py::arg("sorted_nearest"), py::arg("nearest_order"), py::arg("nearest_gradient"), py::arg("samples"),
        py::arg("classes"), py::arg("size"), py::arg("class_begin"), py::arg("chunk"), py::arg("inner_product"));

    m.def(
        "project_embedding_gradient",
        [](uintptr_t stream, Tensor gradient, Tensor normalized_embeddings, Tensor inverse_norm, Tensor weight,
           Tensor weight_inverse_norm, Tensor labels, Tensor row_scale, Tensor scale, Tensor target_gradient,
           Tensor uniform_gradient, Tensor uniform_weight, Tensor scale_gradient, int64_t samples, int64_t classes,
           int64_t size, bool inner_product) {
            Scalar s = scalar_of(scale);
            run_as<Backend>(gradient, stream, [&](auto t) {
                return ProjectEmbeddingGradient<decltype(t)>{Address(gradient),
                                                             Address(normalized_embeddings),
                                                             Address(inverse_norm),
                                                             view_of(weight),
                                                             Address(weight_inverse_norm),
                                                             Address(labels),
                                                             Address(row_scale),
                                                             s.values,
                                                             s.value,
                                                             Address(target_gradient),
                                                             Address(uniform_gradient),
                                                             Address(uniform_weight),
                                                             Address(scale_gradient),
                                                             samples,
                                                             classes,
                                                             size,
                                                             inner_product};
            });
        },
        py::arg("stream"), py::kw_only(), py::arg("gradient"), py::arg("normalized_embeddings"),
        py::arg("inverse_norm"), py::arg("weight"), py::arg("weight_inverse_norm"), py::arg("labels"),
        py::arg("row_scale"), py::arg("scale"), py::arg("target_gradient"), py::arg("uniform_gradient"),
        py::arg("uniform_weight"), py::arg("scale_gradient"), py::arg("samples"), py::arg("classes"), py::arg("size"),
        py::arg("inner_product"));

    m.def(
        "nearest_tile",
        [](uintptr_t stream, Tensor products, Tensor cosine, Tensor index, int64_t rows, int64_t columns,
           int64_t row_begin, int64_t column_begin) {
            run_as<Backend>(products, stream, [&](auto t) {
                return NearestTile<decltype(t)>{Address(products), Address(cosine), Address(index), rows,
                                                columns,           row_begin,       column_begin};
            });
        },
        py::arg("stream"), py::kw_only(), py::arg("products"), py::arg("cosine"), py::arg("index"), py::arg("rows"),
        py::arg("columns"), py::arg("row_begin"), py::arg("column_begin"));
}

} // namespace

PYBIND11_MODULE(FM_MODULE_NAME, m) {
    m.doc() = "The compiled kernels of fused_margin; not a public interface.";
    py::module_ host = m.def_submodule("cpu");
    define_kernels<Cpu>(host);
    define_search_kernels<Cpu>(host);
    host.attr("class_major") = true; // layout of ExponentSum::products
    py::enum_<cpu::Capability>(host, "Capability", py::arithmetic(), py::module_local())
        .value("plain", cpu::Capability::plain)
        .value("avx2", cpu::Capability::avx2)
        .value("avx512", cpu::Capability::avx512);
    host.def("best_capability", &cpu::best_capability);
    host.def("capability", &cpu::capability);
    host.def("use", [](cpu::Capability value) {
        if (value > cpu::best_capability())
            throw py::value_error("this processor, or this build, does not have that instruction set");
        cpu::use(value);
    });
    host.def("advise_huge_pages",
             [](Tensor tensor, int64_t bytes) { cpu::advise_huge_pages(Address(tensor).data, bytes); });
#ifdef FM_CUDA
    py::module_ device = m.def_submodule("cuda");
    define_kernels<Cuda>(device);
    define_search_kernels<Cuda>(device);
    device.attr("class_major") = false;
#ifdef FM_SM80
    define_tensor_kernels(device);
#endif
#endif
    m.attr("cuda_architectures") = FM_CUDA_ARCHITECTURES; // empty in a CPU-only build
    m.attr("cuda_toolkit") = FM_CUDA_TOOLKIT;
}
