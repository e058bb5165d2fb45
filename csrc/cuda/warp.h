// Helpers of kernels that assign one warp to a row: the row's number, and reductions over the lanes.
#pragma once

#include "device.h"

#include <cstdint>
#include <math.h>

namespace fm::cuda {

constexpr int kWarp = 32;
constexpr int kRowThreads = 256;  // of a block that works on one long row
constexpr int kWarpsPerBlock = 4; // each works on one row of D elements
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

// The sum of the products a(d) b(d) in double, in a fixed order.
template <class A, class B> __device__ double warp_dot_of(A a, B b, int64_t size) {
    double sum = 0.0;
    for (int64_t d = lane(); d < size; d += kWarp) sum += static_cast<double>(a(d)) * static_cast<double>(b(d));
    return warp_sum(sum);
}

// First position in ascending keys[0, count) that is not below key. A warp compares 32 keys at a time, so that few
// loads depend on one another.
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

} // namespace fm::cuda
