// The inverse norm of a row, and which rows count as zero.
#pragma once

#include "../kernels/types.h"
#include "platform.h"

namespace fm {

FM_HD double inverse_norm_of(double squares) {
    double norm = sqrt(squares);
    // NaN stays NaN, and norm - norm makes NaN of an infinite norm, whose inverse would count as that of a zero row
    return norm < kSmallestNorm ? 0.0 : 1.0 / norm + (norm - norm);
}

} // namespace fm
