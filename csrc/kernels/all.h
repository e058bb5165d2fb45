// The kernels that both backends implement.
#pragma once

#include "loss.h"
#include "search.h"
#include "step.h"

// X(params) for the params struct of every kernel
// clang-format off
#define FM_ALL_KERNELS(X)                                                  \
    X(RowNormalize<float>)             X(RowNormalize<double>)             \
    X(TargetCosine<float>)             X(TargetCosine<double>)             \
    X(ExponentSum<float>)              X(ExponentSum<double>)              \
    X(MarginRows)                                                          \
    X(ProjectWeightGradient<float>)    X(ProjectWeightGradient<double>)    \
    X(ProjectEmbeddingGradient<float>) X(ProjectEmbeddingGradient<double>) \
    X(StepRows<float>)                 X(StepRows<double>)                 \
    X(NearestTile<float>)              X(NearestTile<double>)              \
    X(QuantizeRows)                    X(MeasureQuantization)              \
    X(UpdateCandidates)                X(RemoveRefreshed)                  \
    X(RerankCandidates)                X(SearchExact)
// clang-format on
