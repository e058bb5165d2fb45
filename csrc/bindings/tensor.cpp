// The tensor-core kernels in Python: a submodule for each family, and the helpers around their products.
#include "bind.h"

namespace fm::python {
namespace {

struct Helpers {
    template <class P> static void run(const P& p, uintptr_t stream) { cuda::run(p, reinterpret_cast<void*>(stream)); }
};

#define FM_FAMILY(Name, space)                                                                                         \
    struct Name {                                                                                                      \
        template <class P> static void run(const P& p, uintptr_t stream) {                                             \
            cuda::space::run(p, reinterpret_cast<void*>(stream));                                                      \
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
    bind<Family, cuda::TensorDump>(m, "dump");
    bind<Family, cuda::TensorExponentSum>(m, "exponent_sum");
    bind<Family, cuda::TensorProbabilities>(m, "probabilities");
    bind<Family, cuda::TensorNearest>(m, "nearest");
}

} // namespace

void define_tensor_kernels(py::module_ m) {
    m.attr("operand_scale") = cuda::kOperandScale;
    m.attr("probability_scale") = cuda::kProbabilityScale;
    bind<Helpers, cuda::PackOperand>(m, "pack_operand");
    bind<Helpers, cuda::PrepareRows>(m, "prepare_rows");
    bind<Helpers, cuda::CombinePartials>(m, "combine_partials");
    bind<Helpers, cuda::UnpackNearest>(m, "unpack_nearest");
    define_family<Sm80>(m.def_submodule("sm80"));
#ifdef FM_SM90
    define_family<Sm90>(m.def_submodule("sm90"));
#endif
}

} // namespace fm::python
