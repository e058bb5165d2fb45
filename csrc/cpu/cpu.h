// The CPU backend: the same kernels for every instruction set, one of them chosen when it is first used.
#pragma once

#include "../search.h"

// X(params) for every kernel's params struct
// clang-format off
#define FM_ALL_KERNELS(X)                                                  \
    X(RowNormalize<float>)             X(RowNormalize<double>)             \
    X(TargetCosine<float>)             X(TargetCosine<double>)             \
    X(ExponentSum<float>)              X(ExponentSum<double>)              \
    X(MarginRows)                                                          \
    X(ProjectWeightGradient<float>)    X(ProjectWeightGradient<double>)    \
    X(ProjectEmbeddingGradient<float>) X(ProjectEmbeddingGradient<double>) \
    X(NearestTile<float>)              X(NearestTile<double>)              \
    X(EncodeRows)                      X(MeasureCodes)                     \
    X(OfferTile)                       X(ForgetRenewed)                    \
    X(SettleCandidates)                X(ResolveTile)
// clang-format on

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
Capability best_capability(); // what was compiled in and this processor runs
Capability capability();      // the one in use
void use(Capability);         // for tests; must not exceed best_capability()

int available_threads();

// Asks for huge pages under memory that is about to be written for the first time: 205 MB of fresh
// 4 KiB pages cost as much as a tenth of a training step.
void advise_huge_pages(void* begin, int64_t bytes);

} // namespace fm::cpu
