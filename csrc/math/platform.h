// What lets one header serve the host compiler at every instruction set and nvcc.
#pragma once

#include <cstdint>
#include <cstring>
#include <math.h>

// Inlined by force: these headers are compiled once per instruction set, and a shared out-of-line copy
// could be the one the running processor cannot execute.
#if defined(__CUDACC__)
#define FM_HD __host__ __device__ __forceinline__
#else
#define FM_HD inline __attribute__((always_inline))
#endif

namespace fm {

FM_HD uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

FM_HD float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// a * b + c, rounded once where the processor can, whatever the compiler makes of the loop around it.
FM_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
FM_HD double multiply_add(double a, double b, double c) { return fma(a, b, c); }

} // namespace fm
