// The CPU kernels of the losses. Compiled once per instruction set (FM_ISA names the namespace), vectorized by the
// compiler.
//
// This file must not emit shared out-of-line functions (no standard containers, no external templates): the linker
// would keep one copy for all instruction sets.
#include "weight_gradient.h"

#include <limits>

#include "../math/cross_entropy.h"
#include "../math/exponential.h"

namespace fm::cpu::FM_ISA {
namespace {

template <class T> void row_normalize(const RowNormalize<T>& p) {
#pragma omp parallel num_threads(threads_for(p.count* p.size))
    {
        Scratch<T> buffer(p.size);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < p.count; ++r) {
            const T* x = load_row<T>(p.rows, r, p.size, buffer);
            T inverse = static_cast<T>(inverse_norm_of(dot(x, x, p.size)));
            p.inverse_norm[r] = inverse;
            if (!p.normalized) continue;
            T* out = p.normalized + r * p.size;
            for (int64_t d = 0; d < p.size; ++d) out[d] = x[d] * inverse;
        }
    }
}

template <class T> void target_cosine(const TargetCosine<T>& p) {
#pragma omp parallel num_threads(threads_for(p.samples* p.size))
    {
        Scratch<T> left(p.size), right(p.size);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.samples; ++i) {
            int64_t label = p.labels[i];
            p.cosine[i] = 0.0;
            if (p.row) p.row[i] = -1;
            if (label == p.ignore_index) continue;
            if (label < 0 || label >= p.classes / p.sub_centers) {
#pragma omp critical
                if (p.bad_label.data) *p.bad_label.data = label < 0 ? label : label + 1;
                continue;
            }
            const T* x = load_row<T>(p.embeddings, i, p.size, left);
            double inverse = p.inner_product ? 1.0 : inverse_norm_of(dot(x, x, p.size));
            for (int64_t row = label * p.sub_centers; row < (label + 1) * p.sub_centers; ++row) {
                const T* w = load_row<T>(p.weight, row, p.size, right);
                double cosine =
                    dot(x, w, p.size) * inverse * (p.inner_product ? 1.0 : inverse_norm_of(dot(w, w, p.size)));
                if (row > label * p.sub_centers && !(cosine > p.cosine[i])) continue;
                p.cosine[i] = cosine;
                if (p.row) p.row[i] = row;
            }
        }
    }
}

// Masks all but the best of the sub-centers [begin, begin + sub_centers) of one class.
template <class T> inline void mask_other_sub_centers(const ExponentSum<T>& p, int64_t begin, T* best) {
    for (int64_t i = 0; i < p.samples; ++i) best[i] = kMasked<T>;
    for (int64_t j = begin; j < begin + p.sub_centers; ++j) {
        T* row = p.logits_chunk + j * p.samples;
        T inverse = p.inverse_norm[j];
        for (int64_t i = 0; i < p.samples; ++i) best[i] = row[i] * inverse > best[i] ? row[i] * inverse : best[i];
    }
    for (int64_t j = begin; j < begin + p.sub_centers; ++j) {
        T* row = p.logits_chunk + j * p.samples;
        T inverse = p.inverse_norm[j];
        for (int64_t i = 0; i < p.samples; ++i) {
            T c = row[i] * inverse;
            if (c < best[i]) row[i] = kMasked<T>;                           // NaN stays and makes the sum NaN
            if (c == best[i]) best[i] = std::numeric_limits<T>::infinity(); // the first of equals
        }
    }
}

// Functions of the cosine to a class other than the target, which return the changed cosine and its derivative, slope.
template <class T> struct Unchanged {
    T operator()(int64_t, T cosine, T& slope) const {
        slope = 1;
        return cosine;
    }
};
template <class T> struct HardNegatives {
    const T* threshold; // [N]
    T strength;
    T operator()(int64_t i, T cosine, T& slope) const { return hard_negative(cosine, threshold[i], strength, slope); }
};
template <class T> struct FilteredNegatives {
    const T* threshold; // [N]
    T operator()(int64_t i, T cosine, T& slope) const { return filtered_negative(cosine, threshold[i], slope); }
};

// The largest transformed cosine of every sample with the classes [begin, end).
template <class T, class Transform>
inline void largest_cosines(const ExponentSum<T>& p, int64_t begin, int64_t end, Transform transform, T* largest) {
    for (int64_t i = 0; i < p.samples; ++i) largest[i] = kMasked<T>;
    for (int64_t j = begin; j < end; ++j) {
        const T* row = p.logits_chunk + j * p.samples;
        T inverse = p.inverse_norm[j], bias = p.bias ? p.bias[j] : static_cast<T>(0);
#pragma omp simd
        for (int64_t i = 0; i < p.samples; ++i) {
            T slope;
            T c = transform(i, row[i] * inverse + bias, slope);
            c = row[i] == kMasked<T> ? kMasked<T> : c;
            largest[i] = c > largest[i] ? c : largest[i];
        }
    }
}

// Replaces the products of the classes [begin, end) by their exponentials, and sums these for every sample: 64 classes
// in T, the total in double.
template <class T, class Transform, class Power> inline void exponentials(const ExponentSum<T>& p, int64_t begin,
                                                                          int64_t end, Transform transform, Power power,
                                                                          T* sum, double* total) {
    for (int64_t i = 0; i < p.samples; ++i) total[i] = 0.0;
    for (int64_t block = begin; block < end; block += 64) {
        for (int64_t i = 0; i < p.samples; ++i) sum[i] = 0;
        for (int64_t j = block; j < (block + 64 < end ? block + 64 : end); ++j) {
            T* row = p.logits_chunk + j * p.samples;
            T inverse = p.inverse_norm[j], bias = p.bias ? p.bias[j] : static_cast<T>(0);
#pragma omp simd
            for (int64_t i = 0; i < p.samples; ++i) {
                T slope;
                T c = transform(i, row[i] * inverse + bias, slope);
                T e = power(i, c);
                e = row[i] == kMasked<T> ? static_cast<T>(0) : e;
                sum[i] += e;
                row[i] = e * inverse * slope;
            }
        }
        for (int64_t i = 0; i < p.samples; ++i) total[i] += static_cast<double>(sum[i]);
    }
}

template <class T, class Transform> void exponent_sum(const ExponentSum<T>& p, Transform transform) {
    const int64_t samples = p.samples;
    const int threads = threads_for(samples * p.chunk);
    Scratch<T> per_thread(threads * samples), high(samples), low(samples), k(samples), base(samples);
    bool wide = false;
    if (p.sub_centers > 1) {
        const int64_t groups = p.chunk / p.sub_centers;
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int t = 0; t < threads; ++t)
            for (int64_t group = groups * t / threads; group < groups * (t + 1) / threads; ++group)
                mask_other_sub_centers(p, group * p.sub_centers, per_thread + t * samples);
    }
    for (int64_t i = 0; i < samples; ++i) {
        int64_t target = p.labels[i] * p.sub_centers - p.class_begin;
        if (target >= 0 && target < p.chunk)
            for (int64_t j = target; j < target + p.sub_centers; ++j) p.logits_chunk[j * samples + i] = kMasked<T>;
    }
    if (!p.fixed_exponent.given) {
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int t = 0; t < threads; ++t)
            largest_cosines(p, p.chunk * t / threads, p.chunk * (t + 1) / threads, transform, per_thread + t * samples);
    }
    for (int64_t i = 0; i < samples; ++i) {
        double scale = value_at(p.scale, i);
        p.exponent[i] = p.fixed_exponent.value;
        if (!p.fixed_exponent.given) {
            T largest = per_thread[i];
            for (int t = 1; t < threads; ++t) {
                T other = per_thread[t * samples + i];
                largest = other > largest ? other : largest;
            }
            auto power = WideExponential<T>::of(scale, largest, p.exponent[i]);
            wide |= WideExponential<T>::needed(scale, largest);
            high[i] = power.high, low[i] = power.low, k[i] = power.k, base[i] = power.base;
        } else {
            auto power = Exponential<T>::of(scale, p.exponent[i]);
            high[i] = power.high, low[i] = power.low, k[i] = power.k;
        }
    }
    Scratch<double> totals(threads * samples);
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        int64_t begin = p.chunk * t / threads, end = p.chunk * (t + 1) / threads;
        T* sum = per_thread + t * samples;
        double* total = totals + t * samples;
        auto exponential = [high = +high, low = +low, k = +k](int64_t i, T cosine) {
            return Exponential<T>{high[i], low[i], k[i]}(cosine);
        };
        auto wide_exponential = [high = +high, low = +low, k = +k, base = +base](int64_t i, T cosine) {
            return WideExponential<T>{high[i], low[i], k[i], base[i]}(cosine);
        };
        if (wide)
            exponentials(p, begin, end, transform, wide_exponential, sum, total);
        else
            exponentials(p, begin, end, transform, exponential, sum, total);
    }
    for (int64_t i = 0; i < samples; ++i) {
        p.sum[i] = 0.0;
        for (int t = 0; t < threads; ++t) p.sum[i] += totals[t * samples + i];
    }
}

template <class T> void exponent_sum(const ExponentSum<T>& p) {
    if (!p.hard_threshold) return exponent_sum(p, Unchanged<T>{});
    Scratch<T> threshold(p.samples);
    for (int64_t i = 0; i < p.samples; ++i) threshold[i] = static_cast<T>(p.hard_threshold[i]);
    if (!p.hard_strength) return exponent_sum(p, FilteredNegatives<T>{threshold});
    exponent_sum(p, HardNegatives<T>{threshold, static_cast<T>(*p.hard_strength)});
}

void margin_rows(const MarginRows& p) {
#pragma omp parallel for schedule(static) num_threads(threads_for(64 * p.samples))
    for (int64_t i = 0; i < p.samples; ++i) margin_row(p, i);
}

template <class T> void project_weight_gradient(const ProjectWeightGradient<T>& p) {
#pragma omp parallel num_threads(threads_for(p.chunk* p.size))
    {
        Scratch<T> own(p.size), other(p.size);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < p.chunk; ++row) complete_gradient<T>(p, row, own, other);
    }
}

template <class T> void project_embedding_gradient(const ProjectEmbeddingGradient<T>& p) {
#pragma omp parallel num_threads(threads_for(p.samples* p.size))
    {
        Scratch<T> buffer(p.size);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < p.samples; ++i) {
            T* g = p.gradient + i * p.size;
            const T* x = p.normalized_embeddings + i * p.size;
            T row = p.row_scale ? static_cast<T>(p.row_scale[i]) : static_cast<T>(1);
            if (p.scale_gradient) p.scale_gradient[i] = dot(g, x, p.size) * static_cast<double>(row);
            T scale = row * static_cast<T>(value_at(p.scale, i));
            for (int64_t d = 0; d < p.size; ++d) g[d] *= scale;
            int64_t label = p.labels[i];
            if (label >= 0 && label < p.classes)
                add_scaled(g, static_cast<T>(p.target_gradient[i]) * p.weight_inverse_norm[label],
                           load_row<T>(p.weight, label, p.size, buffer), p.size);
            if (p.uniform_weight) add_scaled(g, static_cast<T>(p.uniform_gradient[i]), p.uniform_weight, p.size);
            if (!p.inner_product) project_out(g, x, static_cast<T>(1), p.inverse_norm[i], p.size);
        }
    }
}

// The best column of one row. Only a greater cosine replaces it, so that the lowest column wins a tie.
template <class T> struct Best {
    T cosine;
    int64_t column;
};

// Finds the best column of one row of a tile, and updates the best row of every column. Each lane keeps the first of
// equals, and merging the lanes prefers the lower column.
template <class T>
inline Best<T> scan_row(const T* scores, int64_t begin, int64_t end, int32_t row, T* column_best, int32_t* column_row) {
    constexpr int lanes = 16;
    T best[lanes];
    int32_t at[lanes];
    for (int l = 0; l < lanes; ++l) best[l] = static_cast<T>(-4), at[l] = -1;
    int64_t j = begin;
    for (; j + lanes <= end; j += lanes) {
#pragma omp simd
        for (int l = 0; l < lanes; ++l) {
            T c = scores[j + l];
            bool more = c > best[l];
            best[l] = more ? c : best[l];
            at[l] = more ? static_cast<int32_t>(j) + l : at[l];
            bool better = c > column_best[j + l];
            column_best[j + l] = better ? c : column_best[j + l];
            column_row[j + l] = better ? row : column_row[j + l];
        }
    }
    for (int l = 0; j < end; ++j, ++l) {
        T c = scores[j];
        if (c > best[l]) best[l] = c, at[l] = static_cast<int32_t>(j);
        if (c > column_best[j]) column_best[j] = c, column_row[j] = row;
    }
    Best<T> result{best[0], at[0]};
    for (int l = 1; l < lanes; ++l)
        if (at[l] >= 0 &&
            (best[l] > result.cosine || result.column < 0 || (best[l] == result.cosine && at[l] < result.column)))
            result = {best[l], at[l]};
    return result;
}

template <class T> inline void update_nearest(const NearestTile<T>& p, int64_t to, T cosine, int64_t index) {
    if (index < 0) return; // an empty row, or a row of NaN only
    if (cosine > p.cosine[to]) p.cosine[to] = cosine, p.index[to] = index;
}

template <class T> void nearest_tile(const NearestTile<T>& p) {
    const bool diagonal = p.row_begin == p.column_begin;
    const int threads = threads_for(p.rows * p.columns);
    // the best row of every column in each thread, merged in ascending row order afterwards
    Scratch<T> best(threads * p.columns);
    Scratch<int32_t> best_row(threads * p.columns);
    for (int64_t k = 0; k < threads * p.columns; ++k) best[k] = static_cast<T>(-4), best_row[k] = -1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int t = 0; t < threads; ++t) {
        T* column_best = best + t * p.columns;
        int32_t* column_row = best_row + t * p.columns;
        for (int64_t r = p.rows * t / threads; r < p.rows * (t + 1) / threads; ++r) {
            const T* row = p.scores + r * p.columns;
            int64_t end = diagonal ? r : p.columns;
            for (int half = 0; half < (diagonal ? 2 : 1); ++half) { // both sides of the diagonal
                Best<T> b = scan_row(row, half ? r + 1 : 0, half ? p.columns : end, static_cast<int32_t>(r),
                                     column_best, column_row);
                update_nearest(p, p.row_begin + r, b.cosine, b.column < 0 ? b.column : p.column_begin + b.column);
            }
        }
    }
    if (diagonal) return; // the tile is symmetric: its rows have covered everything
#pragma omp parallel for schedule(static) num_threads(threads_for(p.columns* threads))
    for (int64_t j = 0; j < p.columns; ++j)
        for (int t = 0; t < threads; ++t) {
            int32_t row = best_row[t * p.columns + j];
            update_nearest(p, p.column_begin + j, best[t * p.columns + j], row < 0 ? -1 : p.row_begin + row);
        }
}

} // namespace

void run(const RowNormalize<float>& p) { row_normalize(p); }
void run(const RowNormalize<double>& p) { row_normalize(p); }
void run(const TargetCosine<float>& p) { target_cosine(p); }
void run(const TargetCosine<double>& p) { target_cosine(p); }
void run(const ExponentSum<float>& p) { exponent_sum(p); }
void run(const ExponentSum<double>& p) { exponent_sum(p); }
void run(const MarginRows& p) { margin_rows(p); }
void run(const ProjectWeightGradient<float>& p) { project_weight_gradient(p); }
void run(const ProjectWeightGradient<double>& p) { project_weight_gradient(p); }
void run(const ProjectEmbeddingGradient<float>& p) { project_embedding_gradient(p); }
void run(const ProjectEmbeddingGradient<double>& p) { project_embedding_gradient(p); }
void run(const NearestTile<float>& p) { nearest_tile(p); }
void run(const NearestTile<double>& p) { nearest_tile(p); }

} // namespace fm::cpu::FM_ISA
