// The choice of the instruction set at run time, and calls of the operating system.
#include "cpu.h"

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fm::cpu {

Capability best_capability() {
#ifdef FM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return Capability::avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Capability::avx2;
#endif
    return Capability::plain;
}

namespace {
Capability& in_use() {
    static Capability value = best_capability();
    return value;
}
} // namespace

Capability capability() { return in_use(); }
void use(Capability value) { in_use() = value; }

#ifdef FM_X86
#define FM_DISPATCH(P)                                                                                                 \
    void run(const P& p) {                                                                                             \
        switch (in_use()) {                                                                                            \
        case Capability::avx512: return avx512::run(p);                                                                \
        case Capability::avx2: return avx2::run(p);                                                                    \
        default: return plain::run(p);                                                                                 \
        }                                                                                                              \
    }
#else
#define FM_DISPATCH(P)                                                                                                 \
    void run(const P& p) { plain::run(p); }
#endif
FM_ALL_KERNELS(FM_DISPATCH)

int available_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

void advise_huge_pages(void* begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 2u << 20;
    uintptr_t first = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
    uintptr_t last = (reinterpret_cast<uintptr_t>(begin) + static_cast<uintptr_t>(bytes)) / page * page;
    if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin;
    (void)bytes;
#endif
}

} // namespace fm::cpu
