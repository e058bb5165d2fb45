// The CPU kernels of the nearest-row search. Compiled once per instruction set, like loss.cpp.
#include "candidates.h"
#include "rows.h"

#include "../math/nearest.h"
#include "../math/quantization.h"

#include <cstring>
#include <limits>

namespace fm::cpu::FM_ISA {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int kBlock = 64; // scores tested together

// A float that is a few bits below x: like rounding down, without a branch.
inline float below(double x) {
    float nearest = static_cast<float>(x);
    return nearest - fabsf(nearest) * 0x1p-22f;
}

// The inner product that decides between rows. Never inlined, so that its bits are the same for every caller.
template <class T> __attribute__((noinline)) double exact_product(const T* a, const T* b, int64_t size) {
    return dot(a, b, size);
}

// Calls f with a zero of the type that rows are computed in.
template <class F> inline void dispatch_compute_type(const MatrixView& rows, F f) {
    if (rows.dtype == Dtype::float64)
        f(double{});
    else
        f(float{});
}

template <class T> void quantize_rows(const QuantizeRows& p) {
#pragma omp parallel num_threads(threads_for(p.count* p.size))
    {
        Scratch<T> buffer(p.size);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < p.count; ++r) {
            int64_t row = p.selected ? p.selected[r] : r;
            const T* x = load_row<T>(p.rows, row, p.size, buffer);
            T largest = 0;
#pragma omp simd reduction(max : largest)
            for (int64_t d = 0; d < p.size; ++d) {
                T magnitude = x[d] < 0 ? -x[d] : x[d];
                largest = magnitude > largest ? magnitude : largest;
            }
            const auto quantizer =
                Int8Quantizer<T>::of(static_cast<double>(largest), exact_product(x, x, p.size), p.inner_product);
            p.scale[row] = quantizer.scale;
            int8_t* codes = p.codes + row * p.size;
            for (int64_t d = 0; d < p.size; ++d) codes[d] = quantizer(x[d]);
        }
    }
}

template <class T, class Code> void measure_quantization(const MeasureQuantization& p) {
#pragma omp parallel num_threads(threads_for(p.count* p.size))
    {
        Scratch<T> buffer(p.size);
        Scratch<Code> other(p.size);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < p.count; ++r) {
            const T* x = load_row<T>(p.rows, r, p.size, buffer);
            const Code* codes = load_row<Code>(p.codes, r, p.size, other);
            double squares = exact_product(x, x, p.size), scale = static_cast<double>(p.scale[r]);
            double inverse = measured_inverse_norm(p, squares);
            double rest = 0.0, codes_squares = 0.0;
#pragma omp simd reduction(+ : rest, codes_squares)
            for (int64_t d = 0; d < p.size; ++d) {
                double q = scale * static_cast<double>(codes[d]);
                double difference = static_cast<double>(x[d]) * inverse - q;
                rest += difference * difference;
                codes_squares += q * q;
            }
            store_measurements(p, r, inverse, squares, rest, codes_squares);
        }
    }
}

// Calls visit(j), ascending, for the j < count <= kBlock that pass the test.
template <class Test, class Visit> inline void for_each_passing(int64_t count, Test test, Visit visit) {
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t j = 0; j < count; ++j) any |= test(j) ? 1 : 0;
    if (!any) return;
    uint8_t passed[kBlock] = {};
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) passed[j] = test(j) ? 1 : 0;
    for (int64_t word = 0; word < kBlock; word += 8) {
        uint64_t bytes;
        memcpy(&bytes, passed + word, 8);
        for (; bytes; bytes &= bytes - 1) visit(word + __builtin_ctzll(bytes) / 8);
    }
}

template <class S> void update_row_candidates(const UpdateCandidates& p, const S* scores) {
    const ScoreTile& t = p.tile;
    const int64_t rows = t.scores.rows, columns = t.scores.columns;
    const float* scale = p.column_scale + t.column_begin;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads_for(rows* columns))
    for (int64_t r = 0; r < rows; ++r) {
        const S* row = scores + r * columns;
        int64_t index = row_index(t, r), first = column_id(t, 0);
        int64_t self = t.same_set ? row_id(t, r) - first : -1;
        const float own = p.row_scale[index], &upper_bound = p.row_candidates.upper_bound[index];
        auto value = [=](int64_t j) { return scaled_score(row[j], own, scale[j]); };
        for (int64_t begin = 0; begin < columns; begin += kBlock) { // the upper bound rises from block to block
            const float least = upper_bound;
            for_each_passing(
                begin + kBlock < columns ? kBlock : columns - begin,
                [=](int64_t j) { return value(begin + j) > least; },
                [&](int64_t j) {
                    if (value(begin + j) > upper_bound && begin + j != self)
                        insert_candidate(p.row_candidates, index, first + begin + j, value(begin + j));
                });
        }
    }
}

// Calls f(begin, count) for the blocks of a tile's columns, each on one thread.
template <class F> void for_each_column_block(const Scores& scores, F f) {
    const int64_t columns = scores.columns, blocks = (columns + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_for(scores.rows* columns))
    for (int64_t block = 0; block < blocks; ++block) {
        int64_t begin = block * kBlock;
        f(begin, columns - begin < kBlock ? columns - begin : kBlock);
    }
}

template <class S> void update_column_candidates(const UpdateCandidates& p, const S* scores) {
    const ScoreTile& t = p.tile;
    for_each_column_block(t.scores, [&](int64_t begin, int64_t count) {
        const int64_t index = t.column_begin + begin;
        const float *scale = p.column_scale + index, *upper_bound = p.column_candidates.upper_bound + index;
        for (int64_t r = 0; r < t.scores.rows; ++r) {
            const S* row = scores + r * t.scores.columns + begin;
            const float own = p.row_scale[row_index(t, r)];
            auto value = [=](int64_t j) { return scaled_score(row[j], own, scale[j]); };
            for_each_passing(
                count, [=](int64_t j) { return value(j) > upper_bound[j]; },
                [&](int64_t j) {
                    int64_t id = row_id(t, r);
                    bool self = t.same_set && id == t.column_first_id + index + j;
                    if (!self && !(p.refreshed && p.refreshed[index + j]))
                        insert_candidate(p.column_candidates, index + j, id, value(j));
                });
        }
    });
}

template <class S> void update_candidates(const UpdateCandidates& p) {
    const S* scores = static_cast<const S*>(p.tile.scores.data);
    if (p.row_candidates.candidate) update_row_candidates(p, scores);
    if (p.column_candidates.candidate) update_column_candidates(p, scores);
}

void remove_refreshed(const RemoveRefreshed& p) {
    const int64_t capacity = p.candidates.capacity;
#pragma omp parallel for schedule(static) num_threads(threads_for(p.count* capacity))
    for (int64_t i = 0; i < p.count; ++i) {
        int32_t* candidate = p.candidates.candidate + i * capacity;
        float* value = p.candidates.value + i * capacity;
        if (p.refreshed_rows[i])
            p.candidates.upper_bound[i] = lowered_bound(p.candidates.upper_bound[i], candidate[0], value[0]);
        int64_t count = 0;
        for (int64_t c = 0; c < capacity && candidate[c] >= 0; ++c) {
            if (p.refreshed_rows[i] || p.refreshed_candidates[candidate[c]]) continue;
            candidate[count] = candidate[c];
            value[count++] = value[c];
        }
        for (; count < capacity && candidate[count] >= 0; ++count) candidate[count] = -1, value[count] = -kInfinity;
    }
}

// Cosines of one query with references, in the type T of the loaded rows.
template <class T> struct Comparison {
    const QuantizedRows &query, &reference;
    const int64_t size;
    Scratch<T> query_buffer, reference_buffer;
    const T* query_row = nullptr;
    double inverse = 0.0;
    Comparison(const QuantizedRows& q, const QuantizedRows& r, int64_t s)
        : query(q), reference(r), size(s), query_buffer(s), reference_buffer(s) {}
    void set_query(int64_t index) {
        query_row = load_row<T>(query.rows, index, size, query_buffer);
        inverse = query.inverse_norm[index];
    }
    double cosine_with(int64_t index) const {
        return exact_product(query_row, load_row<T>(reference.rows, index, size, reference_buffer), size) *
               (inverse * reference.inverse_norm[index]);
    }
};

template <class T> void rerank_candidates(const RerankCandidates& p) {
#pragma omp parallel num_threads(threads_for(p.queries* p.size))
    {
        Comparison<T> compare(p.query, p.reference, p.size);
#pragma omp for schedule(dynamic, 64)
        for (int64_t i = 0; i < p.queries; ++i) {
            if (has_constant_cosine(p.query, i)) {
                fill_constant_nearest(p, i);
                continue;
            }
            compare.set_query(i);
            const double& smallest = smallest_cosine(p.nearest, i);
            for_each_candidate(p.candidates, i, p.nearest.count, [&](int32_t candidate, float value) {
                int64_t index = candidate_row(p, candidate);
                if (index < 0) return;
                if (static_cast<double>(value) + error_bound(p.query, i, p.reference, index) < smallest) return;
                insert_nearest(p.nearest, i, compare.cosine_with(index), candidate);
            });
        }
    }
}

template <class T, bool with_norm, class S> void search_exact_rows(const SearchExact& p, const S* scores) {
    const ScoreTile& t = p.tile;
    const int64_t rows = t.scores.rows, columns = t.scores.columns, first = column_id(t, 0);
    const float *scale = p.reference.scale + t.column_begin, *error = p.reference.error + t.column_begin;
    const float* norm = with_norm ? p.reference.norm + t.column_begin : nullptr;
#pragma omp parallel num_threads(threads_for(rows* columns))
    {
        Comparison<T> compare(p.query, p.reference, p.size);
#pragma omp for schedule(dynamic, 4)
        for (int64_t r = 0; r < rows; ++r) {
            const S* row = scores + r * columns;
            const int64_t index = row_index(t, r), self = t.same_set ? row_id(t, r) - first : -1;
            if (has_constant_cosine(p.query, index)) continue; // rerank_candidates has found its nearest
            compare.set_query(index);
            const double& smallest = smallest_cosine(p.row_nearest, index);
            const float own = p.query.scale[index], own_error = p.query.error[index], length = p.query.length[index];
            auto largest = [=](int64_t j) { // possible cosine
                float bound = (with_norm ? own_error * norm[j] : own_error) + length * error[j];
                return scaled_score(row[j], own, scale[j]) + bound;
            };
            for (int64_t begin = 0; begin < columns; begin += kBlock) { // the threshold rises from block to block
                const float threshold = below(smallest);
                for_each_passing(
                    begin + kBlock < columns ? kBlock : columns - begin,
                    [=](int64_t j) { return largest(begin + j) >= threshold; },
                    [&](int64_t j) {
                        if (largest(begin + j) >= below(smallest) && begin + j != self)
                            insert_nearest(p.row_nearest, index, compare.cosine_with(t.column_begin + begin + j),
                                           first + begin + j);
                    });
            }
        }
    }
}

template <class T, class S> void search_exact_columns(const SearchExact& p, const S* scores) {
    const ScoreTile& t = p.tile;
    for_each_column_block(t.scores, [&](int64_t begin, int64_t count) {
        const int64_t first = t.column_begin + begin;
        const float *scale = p.reference.scale + first, *error = p.reference.error + first;
        const float* length = p.reference.length + first;
        Comparison<T> compare(p.reference, p.query, p.size); // a column is the query here
        float threshold[kBlock];
        for (int64_t j = 0; j < count; ++j) {
            int64_t index = first + j;
            bool searched = !has_constant_cosine(p.reference, index) && !(p.refreshed && p.refreshed[index]);
            threshold[j] = searched ? below(smallest_cosine(p.column_nearest, index)) : kInfinity;
        }
        for (int64_t r = 0; r < t.scores.rows; ++r) {
            const S* row = scores + r * t.scores.columns + begin;
            const int64_t index = row_index(t, r), id = row_id(t, r);
            const float own = p.query.scale[index], own_error = p.query.error[index];
            const float norm = p.query.norm ? p.query.norm[index] : 1.0f;
            for_each_passing(
                count,
                [=, threshold = &threshold[0]](int64_t j) {
                    float bound = error[j] * norm + length[j] * own_error;
                    return scaled_score(row[j], own, scale[j]) + bound >= threshold[j];
                },
                [&](int64_t j) {
                    if (t.same_set && id == t.column_first_id + first + j) return;
                    compare.set_query(first + j);
                    insert_nearest(p.column_nearest, first + j, compare.cosine_with(index), id);
                    threshold[j] = below(smallest_cosine(p.column_nearest, first + j));
                });
        }
    });
}

template <class T, class S> void search_exact(const SearchExact& p) {
    const S* scores = static_cast<const S*>(p.tile.scores.data);
    if (p.row_nearest.index) {
        if (p.reference.norm)
            search_exact_rows<T, true>(p, scores);
        else
            search_exact_rows<T, false>(p, scores);
    }
    if (p.column_nearest.index) search_exact_columns<T>(p, scores);
}

} // namespace

void run(const QuantizeRows& p) {
    dispatch_compute_type(p.rows, [&](auto t) { quantize_rows<decltype(t)>(p); });
}
void run(const MeasureQuantization& p) {
    dispatch_compute_type(p.rows, [&](auto t) {
        if (p.codes.dtype == Dtype::int8)
            measure_quantization<decltype(t), int8_t>(p);
        else
            measure_quantization<decltype(t), decltype(t)>(p);
    });
}
void run(const UpdateCandidates& p) {
    dispatch_score_type(p.tile.scores, [&](auto score) { update_candidates<decltype(score)>(p); });
}
void run(const RemoveRefreshed& p) { remove_refreshed(p); }
void run(const RerankCandidates& p) {
    dispatch_compute_type(p.query.rows, [&](auto t) { rerank_candidates<decltype(t)>(p); });
}
void run(const SearchExact& p) {
    dispatch_compute_type(p.query.rows, [&](auto t) {
        dispatch_score_type(p.tile.scores, [&](auto score) { search_exact<decltype(t), decltype(score)>(p); });
    });
}

} // namespace fm::cpu::FM_ISA
