// The kernels of the losses in portable CUDA, for any GPU; the caller computes the matrix products. One thread group
// writes each output, and reductions run in a fixed order, so that results repeat bit for bit.
#include "cuda.h"
#include "weight_gradient.h"

#include "../math/cross_entropy.h"
#include "../math/exponential.h"

namespace fm::cuda {
namespace {

template <class Piece, class S> __global__ void row_normalize(RowNormalize<typename Piece::Value> p) {
    using T = typename Piece::Value;
    int64_t r = warp_row();
    if (r >= p.count) return;
    const Row<S> row(p.rows, r);
    const int64_t last = Piece::last(p.size);
    Piece x;
    double squares = 0.0;
    for (int64_t begin = 0; begin <= last; begin += Piece::kSize) {
        x.load(row, begin, p.size);
        squares += x.dot(x);
    }
    T inverse = static_cast<T>(inverse_norm_of(warp_sum(squares)));
    if (lane() == 0) p.inverse_norm[r] = inverse;
    if (!p.normalized) return;
    for (int64_t begin = last; begin >= 0; begin -= Piece::kSize) { // the last piece is still in registers
        if (begin < last) x.load(row, begin, p.size);
        x.for_each([&](T& value) { value *= inverse; });
        x.store(p.normalized + r * p.size, begin, p.size);
    }
}

template <class Piece> __global__ void target_cosine(TargetCosine<typename Piece::Value> p) {
    int64_t i = warp_row();
    if (i >= p.samples) return;
    int64_t label = p.labels[i];
    bool known = label >= 0 && label < p.classes / p.sub_centers;
    if (!known || label == p.ignore_index) {
        if (lane() == 0) {
            p.cosine[i] = 0.0;
            if (p.row) p.row[i] = -1;
            if (label != p.ignore_index && p.bad_label.data) *p.bad_label.data = label < 0 ? label : label + 1;
        }
        return;
    }
    double best = 0.0;
    int64_t best_row = label * p.sub_centers;
    for (int64_t row = label * p.sub_centers; row < (label + 1) * p.sub_centers; ++row) {
        double xw = 0.0, xx = 0.0, ww = 0.0;
        for (int64_t begin = 0; begin < p.size; begin += Piece::kSize) {
            Piece x, w;
            x.load(p.embeddings, i, begin, p.size);
            w.load(p.weight, row, begin, p.size);
            xw += x.dot(w), xx += x.dot(x), ww += w.dot(w);
        }
        double cosine = warp_sum(xw);
        xx = warp_sum(xx), ww = warp_sum(ww);
        if (!p.inner_product) cosine *= inverse_norm_of(xx) * inverse_norm_of(ww);
        if (row == label * p.sub_centers || cosine > best) best = cosine, best_row = row;
    }
    if (lane() == 0) {
        p.cosine[i] = best;
        if (p.row) p.row[i] = best_row;
    }
}

// Combines one value of every thread of a block in a fixed order. Every thread gets the result.
template <class Combine> __device__ double block_reduce(double value, double* shared, Combine combine) {
    value = warp_reduce(value, combine);
    __syncthreads(); // an earlier reduction may still be reading
    if (lane() == 0) shared[threadIdx.x / kWarp] = value;
    __syncthreads();
    value = shared[0];
    for (int w = 1; w < kRowThreads / kWarp; ++w) value = combine(value, shared[w]);
    return value;
}

// Masks all but the best of every class's sub-centers in one row.
template <class T> __device__ void mask_other_sub_centers(const ExponentSum<T>& p, T* row) {
    for (int64_t begin = threadIdx.x * p.sub_centers; begin < p.chunk; begin += kRowThreads * p.sub_centers) {
        int64_t best = begin;
        for (int64_t j = begin + 1; j < begin + p.sub_centers; ++j)
            if (row[j] * p.inverse_norm[j] > row[best] * p.inverse_norm[best]) best = j;
        for (int64_t j = begin; j < begin + p.sub_centers; ++j) // NaN stays and makes the sum NaN
            if (j != best && row[j] == row[j]) row[j] = kMasked<T>;
    }
    __syncthreads();
}

template <class T> __global__ void exponent_sum(ExponentSum<T> p) {
    __shared__ double shared[kRowThreads / kWarp];
    int64_t i = blockIdx.x;
    T* row = p.logits_chunk + i * p.chunk;
    double scale = value_at(p.scale, i);
    int64_t target = p.labels[i] * p.sub_centers - p.class_begin;
    T threshold = p.hard_threshold ? static_cast<T>(p.hard_threshold[i]) : static_cast<T>(0);
    T strength = p.hard_strength ? static_cast<T>(*p.hard_strength) : static_cast<T>(0);
    if (p.sub_centers > 1) mask_other_sub_centers(p, row);
    auto is_masked = [&](int64_t j) { return (j >= target && j < target + p.sub_centers) || row[j] == kMasked<T>; };
    auto cosine = [&](int64_t j, T& slope) {
        T c = row[j] * p.inverse_norm[j] + (p.bias ? p.bias[j] : static_cast<T>(0));
        slope = static_cast<T>(1);
        if (!p.hard_threshold) return c;
        return p.hard_strength ? hard_negative(c, threshold, strength, slope) : filtered_negative(c, threshold, slope);
    };
    double k = p.fixed_exponent.value, top = static_cast<double>(kMasked<T>);
    T slope;
    if (!p.fixed_exponent.given) {
        for (int64_t j = threadIdx.x; j < p.chunk; j += kRowThreads) {
            double c = static_cast<double>(cosine(j, slope));
            if (!is_masked(j) && c > top) top = c;
        }
        top = block_reduce(top, shared, [](double a, double b) { return a > b ? a : b; });
    }
    double sum = 0.0;
    auto exponentiate = [&](auto power) {
        for (int64_t j = threadIdx.x; j < p.chunk; j += kRowThreads) {
            T c = cosine(j, slope);
            T e = is_masked(j) ? static_cast<T>(0) : power(c);
            sum += static_cast<double>(e);
            row[j] = e * p.inverse_norm[j] * slope;
        }
    };
    if (!p.fixed_exponent.given && WideExponential<T>::needed(scale, static_cast<T>(top))) {
        exponentiate(WideExponential<T>::of(scale, static_cast<T>(top), k));
    } else {
        if (!p.fixed_exponent.given) k = row_exponent(scale, top);
        exponentiate(Exponential<T>::of(scale, k));
    }
    sum = block_reduce(sum, shared, [](double a, double b) { return a + b; });
    if (threadIdx.x == 0) {
        p.exponent[i] = k;
        p.sum[i] = sum;
    }
}

__global__ void margin_rows(MarginRows p) {
    int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
    if (i < p.samples) margin_row(p, i);
}

template <class Piece, class S>
__global__ void project_weight_gradient(ProjectWeightGradient<typename Piece::Value> p) {
    int64_t row = warp_row();
    if (row >= p.chunk) return;
    auto* gradient = p.gradient + row * p.size;
    complete_weight_gradient<Piece, S>(
        p, row, [&](const Piece& g, const Piece&, int64_t begin) { g.store(gradient, begin, p.size); });
}

template <class Piece> __global__ void project_embedding_gradient(ProjectEmbeddingGradient<typename Piece::Value> p) {
    using T = typename Piece::Value;
    int64_t i = warp_row();
    if (i >= p.samples) return;
    const Row<T> embedding(p.normalized_embeddings + i * p.size);
    double row = p.row_scale ? p.row_scale[i] : 1.0, along = 0.0;
    T scale = static_cast<T>(row * value_at(p.scale, i));
    int64_t label = p.labels[i];
    auto prepare = [&](Piece& g, int64_t begin) {
        if (p.scale_gradient) {
            Piece x;
            x.load(embedding, begin, p.size);
            along += g.dot(x);
        }
        g.for_each([&](T& value) { value *= scale; });
        if (label >= 0 && label < p.classes) {
            T factor = static_cast<T>(p.target_gradient[i]) * p.weight_inverse_norm[label];
            dispatch_dtype(p.weight.dtype,
                           [&](auto s) { g.add(factor, Row<decltype(s)>(p.weight, label), begin, p.size); });
        }
        if (p.uniform_weight) g.add(static_cast<T>(p.uniform_gradient[i]), Row<T>(p.uniform_weight), begin, p.size);
    };
    T* gradient = p.gradient + i * p.size;
    auto finish = [&](const Piece& g, const Piece&, int64_t begin) { g.store(gradient, begin, p.size); };
    project_row<Piece>(gradient, embedding, p.size, !p.inner_product, static_cast<T>(1), p.inverse_norm[i], prepare,
                       finish);
    if (!p.scale_gradient) return;
    along = warp_sum(along) * row;
    if (lane() == 0) p.scale_gradient[i] = along;
}

// The best partner that one thread has found. A thread visits its partners in ascending order.
template <class T> struct Best {
    T cosine = static_cast<T>(-4);
    int64_t index = -1;
    __device__ void update(T c, int64_t at) {
        if (c > cosine) cosine = c, index = at;
    }
    __device__ void merge(T c, int64_t at) {
        if (c > cosine || (c == cosine && at >= 0 && (index < 0 || at < index))) cosine = c, index = at;
    }
};

template <class T> __device__ void update_nearest(const NearestTile<T>& p, int64_t to, const Best<T>& best) {
    if (best.index >= 0 && best.cosine > p.cosine[to]) p.cosine[to] = best.cosine, p.index[to] = best.index;
}

// The best column of one row, by one block.
template <class T> __global__ void nearest_of_rows(NearestTile<T> p) {
    __shared__ T cosines[kRowThreads];
    __shared__ int64_t indices[kRowThreads];
    int64_t row = p.row_begin + blockIdx.x;
    const T* scores = p.scores + static_cast<int64_t>(blockIdx.x) * p.columns;
    Best<T> best;
    for (int64_t j = threadIdx.x; j < p.columns; j += kRowThreads) {
        int64_t column = p.column_begin + j;
        if (column != row) best.update(scores[j], column);
    }
    cosines[threadIdx.x] = best.cosine;
    indices[threadIdx.x] = best.index;
    for (int half = kRowThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        int t = static_cast<int>(threadIdx.x);
        if (t < half) {
            best.merge(cosines[t + half], indices[t + half]);
            cosines[t] = best.cosine;
            indices[t] = best.index;
        }
    }
    if (threadIdx.x == 0) update_nearest(p, row, best);
}

// The best row of each of 32 adjacent columns, by one block: each of its eight warps takes every eighth row.
template <class T> __global__ void nearest_of_columns(NearestTile<T> p) {
    constexpr int groups = kRowThreads / kWarp;
    __shared__ T cosines[groups][kWarp];
    __shared__ int64_t indices[groups][kWarp];
    int64_t j = static_cast<int64_t>(blockIdx.x) * kWarp + lane();
    int group = static_cast<int>(threadIdx.x) / kWarp;
    Best<T> best;
    if (j < p.columns)
        for (int64_t r = group; r < p.rows; r += groups) best.update(p.scores[r * p.columns + j], p.row_begin + r);
    cosines[group][lane()] = best.cosine;
    indices[group][lane()] = best.index;
    __syncthreads();
    if (group > 0 || j >= p.columns) return;
    for (int g = 1; g < groups; ++g) best.merge(cosines[g][lane()], indices[g][lane()]);
    update_nearest(p, p.column_begin + j, best);
}

template <class T> void start(const ExponentSum<T>& p, void* stream) {
    launch(exponent_sum<T>, p.samples, kRowThreads, stream, p);
}

template <class T> void start(const NearestTile<T>& p, void* stream) {
    launch(nearest_of_rows<T>, p.rows, kRowThreads, stream, p);
    if (p.row_begin != p.column_begin)
        launch(nearest_of_columns<T>, (p.columns + kWarp - 1) / kWarp, kRowThreads, stream, p);
}

template <class T> void start(const RowNormalize<T>& p, void* stream) {
    bool vectors = has_vectors<16 / sizeof(T)>(p.rows, p.size) && has_vectors(p.normalized, p.size);
    dispatch_piece<T>(vectors, p.size, [&](auto piece) {
        dispatch_dtype(p.rows.dtype, [&](auto s) {
            launch_warp_rows(row_normalize<decltype(piece), decltype(s)>, p.count, stream, p);
        });
    });
}

template <class T> void start(const TargetCosine<T>& p, void* stream) {
    constexpr int group = 16 / sizeof(T);
    bool vectors = has_vectors<group>(p.embeddings, p.size) && has_vectors<group>(p.weight, p.size);
    // short pieces for rows of any size: no row is read a second time, and each thread holds two pieces
    auto kernel = vectors ? target_cosine<Piece<T, group, 4, Access::vectors>>
                          : target_cosine<Piece<T, group, 4, Access::strided>>;
    launch_warp_rows(kernel, p.samples, stream, p);
}

template <class T> void start(const ProjectWeightGradient<T>& p, void* stream) {
    dispatch_piece<T>(has_vectors(p), p.size, [&](auto piece) {
        dispatch_dtype(p.weight.dtype, [&](auto s) {
            launch_warp_rows(project_weight_gradient<decltype(piece), decltype(s)>, p.chunk, stream, p);
        });
    });
}

template <class T> void start(const ProjectEmbeddingGradient<T>& p, void* stream) {
    bool vectors = has_vectors<16 / sizeof(T)>(p.weight, p.size);
    for (const T* rows : {static_cast<const T*>(p.gradient), p.normalized_embeddings, p.uniform_weight})
        vectors = vectors && has_vectors(rows, p.size);
    dispatch_piece<T>(vectors, p.size, [&](auto piece) {
        launch_warp_rows(project_embedding_gradient<decltype(piece)>, p.samples, stream, p);
    });
}

} // namespace

#define FM_RUN(Params)                                                                                                 \
    void run(const Params<float>& p, void* stream) { start(p, stream); }                                               \
    void run(const Params<double>& p, void* stream) { start(p, stream); }
FM_RUN(RowNormalize)
FM_RUN(TargetCosine)
FM_RUN(ProjectWeightGradient)
FM_RUN(ProjectEmbeddingGradient)

FM_RUN(ExponentSum)
FM_RUN(NearestTile)
void run(const MarginRows& p, void* stream) {
    launch(margin_rows, (p.samples + kRowThreads - 1) / kRowThreads, kRowThreads, stream, p);
}

} // namespace fm::cuda
