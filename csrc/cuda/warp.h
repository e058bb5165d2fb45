// Kernels that give one warp to a row: which row, and sums over the lanes.
#pragma once

#include "device.h"

#include "../kernels.h"

#include <cstdint>
#include <math.h>

namespace fm::cuda {

constexpr int kWarp = 32;
constexpr int kRowThreads = 256;  // one block for one long row
constexpr int kWarpsPerBlock = 4; // one warp for one row of D elements
constexpr unsigned kWholeWarp = 0xffffffffu;

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int64_t warp_row() {
    return static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + static_cast<int64_t>(threadIdx.x) / kWarp;
}
inline int64_t warp_blocks(int64_t rows) { return (rows + kWarpsPerBlock - 1) / kWarpsPerBlock; }

template <class P> void launch_warp_rows(void (*kernel)(P), int64_t rows, void* stream, const P& p) {
    launch(kernel, warp_blocks(rows), kWarpsPerBlock * kWarp, stream, p);
}

template <class Combine> __device__ double warp_reduce(double value, Combine combine) {
    for (int offset = kWarp / 2; offset > 0; offset /= 2)
        value = combine(value, __shfl_xor_sync(kWholeWarp, value, offset));
    return value;
}

__device__ inline double warp_sum(double value) {
    return warp_reduce(value, [](double a, double b) { return a + b; });
}

// The sum of products a(d) b(d) in double, in one order.
template <class A, class B> __device__ double warp_dot_of(A a, B b, int64_t size) {
    double sum = 0.0;
    for (int64_t d = lane(); d < size; d += kWarp) sum += static_cast<double>(a(d)) * static_cast<double>(b(d));
    return warp_sum(sum);
}

// First position in ascending keys[0, count) that is not below key. A warp compares 32 keys at a time, so that few
// loads depend on each other.
__device__ inline int64_t warp_lower_bound(const int64_t* keys, int64_t count, int64_t key) {
    int64_t low = 0;
    while (count > 0) {
        int64_t step = (count + kWarp - 1) / kWarp, at = lane() * step;
        int below = __popc(__ballot_sync(kWholeWarp, at < count && keys[low + at] < key));
        if (below == 0) break;
        int64_t found = (below - 1) * step + 1, end = below * step;
        low += found;
        count = (end < count ? end : count) - found;
    }
    return low;
}

__device__ inline double inverse_norm_of(double squares) {
    double norm = sqrt(squares);
    // NaN stays NaN; norm - norm makes one of a norm that is infinite, which would otherwise count as zero
    return norm < kSmallestNorm ? 0.0 : 1.0 / norm + (norm - norm);
}

} // namespace fm::cuda
