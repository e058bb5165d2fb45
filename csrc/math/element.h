// Reading one element: of a matrix of any dtype, of a scalar per sample, of sorted keys.
#pragma once

#include "../kernels/types.h"
#include "platform.h"

namespace fm {

FM_HD float from_bfloat16(uint16_t h) { return float_of(static_cast<uint32_t>(h) << 16); }

FM_HD float from_float16(uint16_t h) {
    uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return float_of(sign | 0x7f800000u | (rest & 0x3ffu) << 13); // inf, NaN
    // the bits shifted to a float's position stand for the value times 2^-112, denormals included
    return float_of(sign | bits_of(float_of(rest << 13) * 5.192296858534828e33f));
}

template <class T> FM_HD T element(const MatrixView& m, int64_t row, int64_t column) {
    int64_t at = row * m.row_stride + column * m.column_stride;
    switch (m.dtype) {
    case Dtype::float32: return static_cast<T>(static_cast<const float*>(m.data)[at]);
    case Dtype::float64: return static_cast<T>(static_cast<const double*>(m.data)[at]);
    case Dtype::int8: return static_cast<T>(static_cast<const int8_t*>(m.data)[at]);
    case Dtype::float16: return static_cast<T>(from_float16(static_cast<const uint16_t*>(m.data)[at]));
    default: return static_cast<T>(from_bfloat16(static_cast<const uint16_t*>(m.data)[at]));
    }
}

FM_HD double value_at(const Scalar& s, int64_t i) { return s.values ? s.values[i] : s.value; }

// First position in ascending keys[0, count) that is not below key.
FM_HD int64_t lower_bound(const int64_t* keys, int64_t count, int64_t key) {
    int64_t low = 0;
    while (count > 0) {
        int64_t half = count / 2;
        if (keys[low + half] < key) {
            low += half + 1;
            count -= half + 1;
        } else {
            count = half;
        }
    }
    return low;
}

} // namespace fm
