// Helpers that let one header serve nvcc and the host compiler at every instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <math.h>

// Always inlined: these headers are compiled once per instruction set, and a shared out-of-line copy could contain
// instructions that the running processor does not have.
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

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;
constexpr double kPi = 3.14159265358979323846;

// a * b + c, rounded once on processors that can, independently of the compiler's choices in the surrounding loop.
FM_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
FM_HD double multiply_add(double a, double b, double c) { return fma(a, b, c); }

} // namespace fm
