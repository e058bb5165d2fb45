// Types and constants that the params structs of all kernels share.
#pragma once

#include <cstdint>

namespace fm {

enum class Dtype : int { float32, float64, float16, bfloat16, int8 };

// A matrix in the caller's memory: any dtype, strides in elements.
struct MatrixView {
    const void* data;
    Dtype dtype;
    int64_t row_stride, column_stride;
};

// Contiguous rows of any floating-point dtype that a kernel writes; data is null if there are none.
struct MutableRows {
    void* data;
    Dtype dtype;
};

// One number for all samples, or one per sample.
struct Scalar {
    const double* values; // [N] or null
    double value;         // used if values is null
};

struct OptionalNumber {
    bool given;
    double value; // 0 if not given
};

// One int64 that the host can read while the device runs. Python passes its address, 0 for null.
struct Address {
    int64_t* data;
};

// A shorter row counts as a zero row.
inline constexpr double kSmallestNorm = 1e-12;

} // namespace fm
