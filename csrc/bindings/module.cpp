// The Python module: one function per kernel, taking tensors, in the submodules cpu and cuda.
#include "bind.h"

#include "../cpu/cpu.h"
#ifdef FM_CUDA
#include "../cuda/cuda.h"
#endif

#ifndef FM_CUDA_ARCHITECTURES
#define FM_CUDA_ARCHITECTURES ""
#define FM_CUDA_TOOLKIT ""
#endif

namespace fm::python {

void define_tensor_kernels(py::module_ cuda); // tensor.cpp

namespace {

struct Cpu {
    template <class P> static void run(const P& p, uintptr_t) { cpu::run(p); }
};
#ifdef FM_CUDA
struct Cuda {
    template <class P> static void run(const P& p, uintptr_t stream) { cuda::run(p, reinterpret_cast<void*>(stream)); }
};
#endif

template <class Backend> void define_kernels(py::module_ m) {
    bind_typed<Backend, RowNormalize>(m, "row_normalize", "inverse_norm");
    bind_typed<Backend, TargetCosine>(m, "target_cosine", "compute_like");
    bind_typed<Backend, ExponentSum>(m, "exponent_sum", "logits_chunk");
    bind<Backend, MarginRows>(m, "margin_rows");
    bind_typed<Backend, ProjectWeightGradient>(m, "project_weight_gradient", "gradient");
    bind_typed<Backend, StepRows>(m, "step_rows", "gradient");
    bind_typed<Backend, ProjectEmbeddingGradient>(m, "project_embedding_gradient", "gradient");
    bind_typed<Backend, NearestTile>(m, "nearest_tile", "scores");
    bind<Backend, QuantizeRows>(m, "quantize_rows");
    bind<Backend, MeasureQuantization>(m, "measure_quantization");
    bind<Backend, UpdateCandidates>(m, "update_candidates");
    bind<Backend, RemoveRefreshed>(m, "remove_refreshed");
    bind<Backend, RerankCandidates>(m, "rerank_candidates");
    bind<Backend, SearchExact>(m, "search_exact");
}

void define_cpu(py::module_ m) {
    define_kernels<Cpu>(m);
    m.attr("class_major") = true; // the layout of ExponentSum::logits_chunk
    py::enum_<cpu::Capability>(m, "Capability", py::arithmetic(), py::module_local())
        .value("plain", cpu::Capability::plain)
        .value("avx2", cpu::Capability::avx2)
        .value("avx512", cpu::Capability::avx512);
    m.def("best_capability", &cpu::best_capability);
    m.def("capability", &cpu::capability);
    m.def("use", [](cpu::Capability value) {
        if (value > cpu::best_capability())
            throw py::value_error("this processor, or this build, does not have that instruction set");
        cpu::use(value);
    });
    m.def("advise_huge_pages", [](const py::object& tensor, int64_t bytes) {
        cpu::advise_huge_pages(data_of(Name{"advise_huge_pages", "tensor"}, tensor), bytes);
    });
}

} // namespace
} // namespace fm::python

PYBIND11_MODULE(FM_MODULE_NAME, m) {
    using namespace fm::python;
    m.doc() = "The compiled kernels of fused_margin; not a public interface.";
    m.attr("SMALLEST_NORM") = fm::kSmallestNorm;
    define_cpu(m.def_submodule("cpu"));
#ifdef FM_CUDA
    py::module_ device = m.def_submodule("cuda");
    define_kernels<Cuda>(device);
    device.attr("class_major") = false;
#ifdef FM_SM80
    define_tensor_kernels(device);
#endif
#endif
    m.attr("cuda_architectures") = FM_CUDA_ARCHITECTURES; // empty in a CPU-only build
    m.attr("cuda_toolkit") = FM_CUDA_TOOLKIT;
}
