// Rows of any element type, held in the registers of the warp that a kernel assigns to a row.
//
// The element type and the kind of access are template parameters: they are chosen once per launch, or once per piece
// of a row, not per element.
#pragma once

#include "warp.h"

#include "../math/element.h"
#include "../math/norm.h"

namespace fm::cuda {

// The 16-bit element types; the others are float and double themselves.
struct Half {
    uint16_t bits;
};
struct BFloat16 {
    uint16_t bits;
};

template <class T, class S> __device__ T value_of(S x) { return static_cast<T>(x); }
template <class T> __device__ T value_of(Half x) { return static_cast<T>(low_half(x.bits)); }
template <class T> __device__ T value_of(BFloat16 x) { return static_cast<T>(from_bfloat16(x.bits)); }

// Calls f with a value of the type that stands for a floating-point dtype.
#ifdef __CUDACC__
#pragma nv_exec_check_disable // f is a lambda of the caller, which runs on the host or on the device
#endif
template <class F> FM_HD auto dispatch_dtype(Dtype dtype, F f) {
    switch (dtype) {
    case Dtype::float32: return f(float{});
    case Dtype::float64: return f(double{});
    case Dtype::float16: return f(Half{});
    default: return f(BFloat16{});
    }
}

template <class S> struct Row {
    const S* data;
    int64_t stride;

    __device__ explicit Row(const S* contiguous) : data(contiguous), stride(1) {}
    __device__ Row(const MatrixView& m, int64_t row)
        : data(static_cast<const S*>(m.data) + row * m.row_stride), stride(m.column_stride) {}

    template <class T> __device__ T at(int64_t column) const { return value_of<T>(data[column * stride]); }
};

// Which elements of a row belong to a lane, and how it reads them.
enum class Access {
    vectors,  // groups of adjacent elements, 16 bytes at a time
    adjacent, // groups of adjacent elements, one by one: for rows that are strided or not aligned
    strided,  // every 32nd element, one by one: for the same rows, if a lane needs no adjacent elements
};

// Elements of S in one load of a group of G.
template <class S, int G> constexpr int kLoad = G * sizeof(S) < 16 ? G : 16 / static_cast<int>(sizeof(S));

// `size` consecutive elements of a row, K groups of G in every lane. Elements beyond the row's end are 0.
template <class T, int G, int K, Access A> struct Piece {
    using Value = T;
    static constexpr int kGroup = G, kGroups = K;
    static constexpr Access kAccess = A;
    static constexpr int kSize = kWarp * G * K;

    T value[K][G];

    // Where the last piece of a row begins.
    __device__ static int64_t last(int64_t size) { return (size - 1) / kSize * kSize; }

    // Position in the piece of element e of a lane's group k.
    __device__ static int offset(int k, int e) {
        return A == Access::strided ? (k * G + e) * kWarp + lane() : (k * kWarp + lane()) * G + e;
    }

    // Calls f(k, group k of the row's piece at `begin`), as values of type V.
    template <class V, class S, class F>
    __device__ static void read(const Row<S>& row, int64_t begin, int64_t size, F f) {
        const int count = size - begin < kSize ? static_cast<int>(size - begin) : kSize;
        const S* data = row.data + begin * row.stride;
        FM_UNROLL
        for (int k = 0; k < K; ++k) {
            V values[G] = {};
            if constexpr (A == Access::vectors) {
                FM_UNROLL
                for (int e = 0; e < G; e += kLoad<S, G>) {
                    S loaded[kLoad<S, G>] = {};
                    if (offset(k, e) < count) load_aligned(data + offset(k, e), loaded);
                    FM_UNROLL
                    for (int i = 0; i < kLoad<S, G>; ++i) values[e + i] = value_of<V>(loaded[i]);
                }
            } else {
                // one advancing address, because 64-bit addresses of all elements take too many registers
                const S* at = data + offset(k, 0) * row.stride;
                const int64_t step = (offset(k, 1) - offset(k, 0)) * row.stride;
                FM_UNROLL
                for (int e = 0; e < G; ++e, at += step)
                    if (offset(k, e) < count) values[e] = value_of<V>(*at);
            }
            f(k, values);
        }
    }

    template <class S> __device__ void load(const Row<S>& row, int64_t begin, int64_t size) {
        read<T>(row, begin, size, [&](int k, const T(&x)[G]) {
            FM_UNROLL
            for (int e = 0; e < G; ++e) value[k][e] = x[e];
        });
    }

    // Loads from a matrix whose element type is not a template parameter.
    __device__ void load(const MatrixView& m, int64_t row, int64_t begin, int64_t size) {
        dispatch_dtype(m.dtype, [&](auto s) { load(Row<decltype(s)>(m, row), begin, size); });
    }

    // Stores round(element, k, e) for element e of every group k, to a contiguous row of another type.
    template <class S, class Round> __device__ void store(S* row, int64_t begin, int64_t size, Round round) const {
        const int count = size - begin < kSize ? static_cast<int>(size - begin) : kSize;
        FM_UNROLL
        for (int k = 0; k < K; ++k) {
            if constexpr (A == Access::vectors) {
                FM_UNROLL
                for (int e = 0; e < G; e += kLoad<S, G>) {
                    S stored[kLoad<S, G>];
                    FM_UNROLL
                    for (int i = 0; i < kLoad<S, G>; ++i) stored[i] = round(value[k][e + i], k, e + i);
                    if (offset(k, e) < count) store_aligned(row + begin + offset(k, e), stored);
                }
            } else {
                FM_UNROLL
                for (int e = 0; e < G; ++e)
                    if (offset(k, e) < count) row[begin + offset(k, e)] = round(value[k][e], k, e);
            }
        }
    }
    __device__ void store(T* row, int64_t begin, int64_t size) const {
        store(row, begin, size, [](T x, int, int) { return x; });
    }

    // Calls f(element) for each element, or f(element, element at the same place of another piece).
    template <class F> __device__ void for_each(F f) {
        FM_UNROLL
        for (int k = 0; k < K; ++k) {
            FM_UNROLL
            for (int e = 0; e < G; ++e) f(value[k][e]);
        }
    }
    template <class F> __device__ void for_each(const Piece& other, F f) {
        FM_UNROLL
        for (int k = 0; k < K; ++k) {
            FM_UNROLL
            for (int e = 0; e < G; ++e) f(value[k][e], other.value[k][e]);
        }
    }

    template <class S> __device__ void add(T scale, const Row<S>& row, int64_t begin, int64_t size) {
        read<T>(row, begin, size, [&](int k, const T(&x)[G]) {
            FM_UNROLL
            for (int e = 0; e < G; ++e) value[k][e] += scale * x[e];
        });
    }
    // The product of the two factors would be too small for a T if the row is very long.
    template <class S> __device__ void add(T scale, T unit, const Row<S>& row, int64_t begin, int64_t size) {
        read<T>(row, begin, size, [&](int k, const T(&x)[G]) {
            FM_UNROLL
            for (int e = 0; e < G; ++e) value[k][e] += scale * (unit * x[e]);
        });
    }

    // This lane's part of the inner product.
    __device__ double dot(const Piece& other) const {
        double sum = 0.0;
        FM_UNROLL
        for (int k = 0; k < K; ++k) {
            FM_UNROLL
            for (int e = 0; e < G; ++e)
                sum += static_cast<double>(value[k][e]) * static_cast<double>(other.value[k][e]);
        }
        return sum;
    }
};

// Whether Access::vectors can read the rows of m, with groups of G elements.
template <int G> bool has_vectors(const MatrixView& m, int64_t size) {
    return dispatch_dtype(m.dtype, [&](auto s) {
        constexpr int load = kLoad<decltype(s), G>;
        return m.column_stride == 1 && m.row_stride % load == 0 && size % load == 0 &&
               reinterpret_cast<uintptr_t>(m.data) % (load * sizeof(s)) == 0;
    });
}

// Whether Access::vectors can read and write contiguous rows, with groups of G elements; true for null.
template <int G> bool has_vectors(const MutableRows& rows, int64_t size) {
    return !rows.data || has_vectors<G>(MatrixView{rows.data, rows.dtype, size, 1}, size);
}
// The same for rows of T, with groups of 16 bytes.
template <class T> bool has_vectors(const T* rows, int64_t size) {
    return !rows || (size * sizeof(T) % 16 == 0 && reinterpret_cast<uintptr_t>(rows) % 16 == 0);
}

// Calls f with a piece that suits rows of this size. A row longer than the longest piece is read a second time.
template <class T, class F> void dispatch_piece(bool vectors, int64_t size, F f) {
    constexpr int group = 16 / static_cast<int>(sizeof(T));
    using Short = Piece<T, group, 4, Access::vectors>;
    if (!vectors) return f(Piece<T, group, 4, Access::strided>{});
    if (size <= Short::kSize) return f(Short{});
    f(Piece<T, group, 8, Access::vectors>{});
}

} // namespace fm::cuda
