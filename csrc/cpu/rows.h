// Operations on rows of a matrix for the CPU kernels: load, multiply, add. Compiled once per instruction set.
#pragma once

#include "cpu.h"

#include <cstdlib>
#include <cstring>

#include "../math/element.h"
#include "../math/norm.h"

namespace fm::cpu::FM_ISA {
namespace {

// Uninitialized memory, freed at the end of the scope.
template <class T> class Scratch {
public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(malloc(static_cast<size_t>(count > 0 ? count : 1) * sizeof(T)))) {
        if (!data_) abort();
    }
    ~Scratch() { free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() const { return data_; }

private:
    T* data_;
};

template <class T> constexpr Dtype dtype_of = Dtype::float32;
template <> constexpr Dtype dtype_of<double> = Dtype::float64;
template <> constexpr Dtype dtype_of<int8_t> = Dtype::int8;

template <class From, class T> inline void copy_row(const From* from, int64_t stride, int64_t size, T* to) {
    for (int64_t d = 0; d < size; ++d) to[d] = static_cast<T>(from[d * stride]);
}

// A row of the matrix as contiguous T: the row itself if it is stored that way, else a copy in the buffer.
template <class T> inline const T* load_row(const MatrixView& m, int64_t row, int64_t size, T* buffer) {
    int64_t begin = row * m.row_stride, stride = m.column_stride;
    if (m.dtype == dtype_of<T> && stride == 1) return static_cast<const T*>(m.data) + begin;
    switch (m.dtype) {
    case Dtype::float32: copy_row(static_cast<const float*>(m.data) + begin, stride, size, buffer); break;
    case Dtype::float64: copy_row(static_cast<const double*>(m.data) + begin, stride, size, buffer); break;
    case Dtype::int8: copy_row(static_cast<const int8_t*>(m.data) + begin, stride, size, buffer); break;
    default:
        for (int64_t d = 0; d < size; ++d) buffer[d] = element<T>(m, row, d);
    }
    return buffer;
}

// Eight numbers from memory, as doubles.
typedef double Eight __attribute__((vector_size(64)));
template <class T> __attribute__((always_inline)) inline void load_eight(const T* from, Eight& to) {
    T numbers __attribute__((vector_size(8 * sizeof(T))));
    memcpy(&numbers, from, sizeof(numbers));
    to = __builtin_convertvector(numbers, Eight);
}

template <class A, class B> inline double dot(const A* a, const B* b, int64_t size) {
    Eight sums[4] = {}, x, y; // four independent sums hide the latency of an addition
    int64_t d = 0;
    for (; d + 32 <= size; d += 32)
#pragma GCC unroll 4
        for (int s = 0; s < 4; ++s) {
            load_eight(a + d + 8 * s, x), load_eight(b + d + 8 * s, y);
            sums[s] += x * y;
        }
    const Eight all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    double sum = ((all[0] + all[1]) + (all[2] + all[3])) + ((all[4] + all[5]) + (all[6] + all[7]));
    for (; d < size; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
    return sum;
}

template <class T> inline void add_scaled(T* to, T scale, const T* from, int64_t size) {
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) to[d] += scale * from[d];
}
// to += scale unit from. The product of the two factors would be too small for a T if the row is very long.
template <class T> inline void add_scaled(T* to, T scale, T unit, const T* from, int64_t size) {
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) to[d] += scale * (unit * from[d]);
}

// The number of threads for a loop over `numbers` elements: starting a team costs microseconds, and far more on a busy
// machine.
inline int threads_for(int64_t numbers) {
    int64_t useful = 1 + numbers / 32768;
    return useful < available_threads() ? static_cast<int>(useful) : available_threads();
}

} // namespace
} // namespace fm::cpu::FM_ISA
