// The CPU backend: the same kernels for every instruction set, which is chosen at the first use.
#pragma once

#include "../kernels/all.h"

namespace fm::cpu {

#define FM_DECLARE(P) void run(const P&);
namespace plain {
FM_ALL_KERNELS(FM_DECLARE)
} // namespace plain
namespace avx2 {
FM_ALL_KERNELS(FM_DECLARE)
} // namespace avx2
namespace avx512 {
FM_ALL_KERNELS(FM_DECLARE)
} // namespace avx512
FM_ALL_KERNELS(FM_DECLARE)
#undef FM_DECLARE

enum class Capability : int { plain, avx2, avx512 };
Capability best_capability(); // the best one that is compiled in and that this processor runs
Capability capability();      // the one in use
void use(Capability);         // for tests; must not exceed best_capability()

int available_threads();

// Requests huge pages for memory that is about to be written for the first time: the page faults of 205 MB in pages of
// 4 KiB take as long as a tenth of a training step.
void advise_huge_pages(void* begin, int64_t bytes);

} // namespace fm::cpu
