// The nearest-row search in portable CUDA, for any GPU. One warp owns the list and the nearest of a row, a column or a
// query and goes through the others in ascending order, so that results repeat bit for bit.
#include "cuda.h"
#include "row.h"

#include "../math/nearest.h"
#include "../math/quantization.h"

#include <limits>
#include <type_traits>

namespace fm::cuda {
namespace {

constexpr float kHighest = std::numeric_limits<float>::infinity(), kLowest = -kHighest;

__device__ inline float round_down(double x) { return nextafterf(static_cast<float>(x), kLowest); }

// The inner product that decides between rows: in double for rows of any type, so that its bits are the same in every
// kernel.
template <class S> __device__ double exact_product(const Row<S>& a, const Row<S>& b, int64_t size) {
    return warp_dot_of([&](int64_t d) { return a.template at<double>(d); },
                       [&](int64_t d) { return b.template at<double>(d); }, size);
}
__device__ inline double exact_product(const MatrixView& a, int64_t i, const MatrixView& b, int64_t j, int64_t size) {
    if (a.dtype == b.dtype)
        return dispatch_dtype(a.dtype, [&](auto s) { return exact_product(Row<decltype(s)>(a, i), {b, j}, size); });
    // rare: not worth a loop for every pair of types
    return warp_dot_of([&](int64_t d) { return element<double>(a, i, d); },
                       [&](int64_t d) { return element<double>(b, j, d); }, size);
}

template <class S> __global__ void quantize_rows(QuantizeRows p) {
    using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
    int64_t r = warp_row();
    if (r >= p.count) return;
    int64_t row = p.selected ? p.selected[r] : r;
    const Row<S> elements(p.rows, row);
    T largest = 0;
    for (int64_t d = lane(); d < p.size; d += kWarp) {
        T x = elements.template at<T>(d), magnitude = x < 0 ? -x : x;
        largest = magnitude > largest ? magnitude : largest;
    }
    double length = warp_reduce(static_cast<double>(largest), [](double a, double b) { return a > b ? a : b; });
    const auto quantizer = Int8Quantizer<T>::of(length, exact_product(elements, elements, p.size), p.inner_product);
    if (lane() == 0) p.scale[row] = quantizer.scale;
    for (int64_t d = lane(); d < p.size; d += kWarp) p.codes[row * p.size + d] = quantizer(elements.template at<T>(d));
}

template <class S> __global__ void measure_quantization(MeasureQuantization p) {
    int64_t r = warp_row();
    if (r >= p.count) return;
    const Row<S> row(p.rows, r);
    double squares = exact_product(row, row, p.size), scale = static_cast<double>(p.scale[r]);
    double inverse = measured_inverse_norm(p, squares);
    double rest = 0.0, codes_squares = 0.0;
    for (int64_t d = lane(); d < p.size; d += kWarp) {
        double q = scale * element<double>(p.codes, r, d);
        double difference = row.template at<double>(d) * inverse - q;
        rest += difference * difference;
        codes_squares += q * q;
    }
    rest = warp_sum(rest), codes_squares = warp_sum(codes_squares);
    if (lane() == 0) store_measurements(p, r, inverse, squares, rest, codes_squares);
}

template <class S> __device__ S score(const ScoreTile& t, int64_t r, int64_t j) {
    return static_cast<const S*>(t.scores.data)[r * t.scores.columns + j];
}

// Calls f(lane) for the lanes whose bit is set, in ascending order.
template <class F> __device__ void for_each_lane(unsigned lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(__ffs(static_cast<int>(lanes)) - 1);
}

// Inserts a product above the upper bound into a list, behind its equals. The whole warp moves the smaller ones, 32 at
// a time from the end. Returns the new upper bound.
__device__ inline float insert_candidate(const CandidateLists& lists, int64_t index, int64_t id, float value) {
    int32_t* candidate = lists.candidate + index * lists.capacity;
    float* values = lists.value + index * lists.capacity;
    float upper_bound = lists.upper_bound[index], last = values[lists.capacity - 1];
    bool full = candidate[lists.capacity - 1] >= 0;
    __syncwarp(); // every lane has read before one writes below
    if (full) {
        upper_bound = raised_bound(upper_bound, value, last);
        if (lane() == 0) lists.upper_bound[index] = upper_bound;
        if (!(value > last)) {
            __syncwarp();
            return upper_bound;
        }
    }
    int64_t end = lists.capacity; // of the entries that are not moved yet
    for (bool more = true; more;) {
        int64_t at = end - 1 - lane();
        float moved = at >= 0 ? values[at] : kHighest;
        int32_t moved_candidate = at >= 0 ? candidate[at] : -1;
        bool smaller = at >= 0 && moved < value;
        int count = __popc(__ballot_sync(kWholeWarp, smaller));
        __syncwarp(); // every lane has read before one writes
        if (smaller && at + 1 < lists.capacity) {
            values[at + 1] = moved;
            candidate[at + 1] = moved_candidate;
        }
        end -= count;
        more = count == kWarp;
    }
    __syncwarp();
    if (lane() == 0) {
        values[end] = value;
        candidate[end] = static_cast<int32_t>(id);
    }
    __syncwarp();
    return upper_bound;
}

// Inserts count products into one list, except that of id `self`, which is -1 if there are two sets.
template <class Value, class Id> __device__ void update_list(const CandidateLists& lists, int64_t index, int64_t self,
                                                             int64_t count, Value value_of, Id id_of) {
    float upper_bound = lists.upper_bound[index];
    for (int64_t begin = 0; begin < count; begin += kWarp) {
        int64_t at = begin + lane();
        float value = at < count && id_of(at) != self ? value_of(at) : kLowest;
        for_each_lane(__ballot_sync(kWholeWarp, value > upper_bound), [&](int from) {
            float inserted = __shfl_sync(kWholeWarp, value, from);
            if (inserted > upper_bound) upper_bound = insert_candidate(lists, index, id_of(begin + from), inserted);
        });
    }
}

template <class S> __global__ void update_row_candidates(UpdateCandidates p) {
    const ScoreTile& t = p.tile;
    int64_t r = warp_row();
    if (r >= t.scores.rows) return;
    int64_t index = row_index(t, r);
    float own = p.row_scale[index];
    update_list(
        p.row_candidates, index, t.same_set ? row_id(t, r) : -1, t.scores.columns,
        [&](int64_t j) { return scaled_score(score<S>(t, r, j), own, p.column_scale[t.column_begin + j]); },
        [&](int64_t j) { return column_id(t, j); });
}

// The columns of a block are adjacent, so its warps share the cache lines that they read of every row.
template <class S> __global__ void update_column_candidates(UpdateCandidates p) {
    const ScoreTile& t = p.tile;
    int64_t j = warp_row();
    if (j >= t.scores.columns) return;
    int64_t index = t.column_begin + j;
    if (p.refreshed && p.refreshed[index]) return;
    float own = p.column_scale[index];
    update_list(
        p.column_candidates, index, t.same_set ? column_id(t, j) : -1, t.scores.rows,
        [&](int64_t r) { return scaled_score(score<S>(t, r, j), p.row_scale[row_index(t, r)], own); },
        [&](int64_t r) { return row_id(t, r); });
}

__global__ void remove_refreshed(RemoveRefreshed p) {
    int64_t i = warp_row();
    if (i >= p.count) return;
    const int64_t capacity = p.candidates.capacity;
    int32_t* candidate = p.candidates.candidate + i * capacity;
    float* value = p.candidates.value + i * capacity;
    bool refreshed = p.refreshed_rows[i];
    if (refreshed && lane() == 0)
        p.candidates.upper_bound[i] = lowered_bound(p.candidates.upper_bound[i], candidate[0], value[0]);
    __syncwarp(); // the first value is written below
    int64_t remaining = 0;
    for (int64_t begin = 0; begin < capacity; begin += kWarp) {
        int64_t c = begin + lane();
        int32_t id = c < capacity ? candidate[c] : -1;
        float known_value = c < capacity ? value[c] : kLowest;
        unsigned stay = __ballot_sync(kWholeWarp, id >= 0 && !refreshed && !p.refreshed_candidates[id]);
        __syncwarp(); // every lane has read before one writes
        if (c < capacity) candidate[c] = -1, value[c] = kLowest;
        __syncwarp(); // all entries are emptied before some are filled again
        if (stay >> lane() & 1) {
            int64_t to = remaining + __popc(stay & ((1u << lane()) - 1));
            candidate[to] = id;
            value[to] = known_value;
        }
        remaining += __popc(stay);
        __syncwarp();
    }
}

// insert_nearest of a whole warp. Returns the smallest of the k cosines.
__device__ inline double warp_insert_nearest(const Nearest& nearest, int64_t query, double cosine, int64_t index) {
    __syncwarp(); // every lane has read the smallest cosine
    if (lane() == 0) insert_nearest(nearest, query, cosine, index);
    __syncwarp();
    return smallest_cosine(nearest, query);
}

__device__ inline double cosine_of(const QuantizedRows& query, int64_t i, const QuantizedRows& reference, int64_t j,
                                   int64_t size) {
    return exact_product(query.rows, i, reference.rows, j, size) * (query.inverse_norm[i] * reference.inverse_norm[j]);
}

__global__ void rerank_candidates(RerankCandidates p) {
    int64_t i = warp_row();
    if (i >= p.queries) return;
    if (has_constant_cosine(p.query, i)) {
        if (lane() == 0) fill_constant_nearest(p, i);
        return;
    }
    double smallest = smallest_cosine(p.nearest, i);
    const int32_t* candidate = p.candidates.candidate + i * p.candidates.capacity;
    const float* value = p.candidates.value + i * p.candidates.capacity;
    for (int64_t c = 0; c < p.candidates.capacity && candidate[c] >= 0; ++c) {
        int64_t index = candidate_row(p, candidate[c]);
        if (index < 0) continue;
        if (static_cast<double>(value[c]) + error_bound(p.query, i, p.reference, index) < smallest) continue;
        double cosine = cosine_of(p.query, i, p.reference, index, p.size);
        smallest = warp_insert_nearest(p.nearest, i, cosine, candidate[c]);
    }
}

// Searches the nearest of count rows for row i of query. Computes only cosines whose upper bound reaches the nearest
// ones found so far.
template <class Value, class Row, class Id>
__device__ void search_exact(const QuantizedRows& query, int64_t i, const Nearest& nearest, int64_t self,
                             const QuantizedRows& others, int64_t count, int64_t size, Value value_of, Row row_of,
                             Id id_of) {
    if (has_constant_cosine(query, i)) return; // rerank_candidates has found its nearest
    double smallest = smallest_cosine(nearest, i);
    const float error = query.error[i], length = query.length[i];
    for (int64_t begin = 0; begin < count; begin += kWarp) {
        int64_t at = begin + lane();
        float largest = kLowest; // possible cosine
        bool other = at < count && id_of(at) != self;
        if (other) {
            int64_t index = row_of(at);
            largest = value_of(at) + (error * (others.norm ? others.norm[index] : 1.0f) + length * others.error[index]);
        }
        for_each_lane(__ballot_sync(kWholeWarp, other && largest >= round_down(smallest)), [&](int from) {
            if (!(__shfl_sync(kWholeWarp, largest, from) >= round_down(smallest))) return;
            double cosine = cosine_of(query, i, others, row_of(begin + from), size);
            smallest = warp_insert_nearest(nearest, i, cosine, id_of(begin + from));
        });
    }
}

template <class S> __global__ void search_exact_rows(SearchExact p) {
    const ScoreTile& t = p.tile;
    int64_t r = warp_row();
    if (r >= t.scores.rows) return;
    const int64_t i = row_index(t, r);
    const float own = p.query.scale[i];
    search_exact(
        p.query, i, p.row_nearest, t.same_set ? row_id(t, r) : -1, p.reference, t.scores.columns, p.size,
        [&](int64_t j) { return scaled_score(score<S>(t, r, j), own, p.reference.scale[t.column_begin + j]); },
        [&](int64_t j) { return t.column_begin + j; }, [&](int64_t j) { return column_id(t, j); });
}

template <class S> __global__ void search_exact_columns(SearchExact p) {
    const ScoreTile& t = p.tile;
    int64_t j = warp_row();
    if (j >= t.scores.columns) return;
    const int64_t i = t.column_begin + j;
    if (p.refreshed && p.refreshed[i]) return;
    const float own = p.reference.scale[i];
    search_exact(
        p.reference, i, p.column_nearest, t.same_set ? column_id(t, j) : -1, p.query, t.scores.rows, p.size,
        [&](int64_t r) { return scaled_score(score<S>(t, r, j), p.query.scale[row_index(t, r)], own); },
        [&](int64_t r) { return row_index(t, r); }, [&](int64_t r) { return row_id(t, r); });
}

} // namespace

void run(const QuantizeRows& p, void* stream) {
    dispatch_dtype(p.rows.dtype, [&](auto s) { launch_warp_rows(quantize_rows<decltype(s)>, p.count, stream, p); });
}
void run(const MeasureQuantization& p, void* stream) {
    dispatch_dtype(p.rows.dtype,
                   [&](auto s) { launch_warp_rows(measure_quantization<decltype(s)>, p.count, stream, p); });
}
void run(const UpdateCandidates& p, void* stream) {
    const Scores& scores = p.tile.scores;
    dispatch_score_type(scores, [&](auto s) {
        using S = decltype(s);
        if (p.row_candidates.candidate) launch_warp_rows(update_row_candidates<S>, scores.rows, stream, p);
        if (p.column_candidates.candidate) launch_warp_rows(update_column_candidates<S>, scores.columns, stream, p);
    });
}
void run(const RemoveRefreshed& p, void* stream) { launch_warp_rows(remove_refreshed, p.count, stream, p); }
void run(const RerankCandidates& p, void* stream) { launch_warp_rows(rerank_candidates, p.queries, stream, p); }
void run(const SearchExact& p, void* stream) {
    const Scores& scores = p.tile.scores;
    dispatch_score_type(scores, [&](auto s) {
        using S = decltype(s);
        if (p.row_nearest.index) launch_warp_rows(search_exact_rows<S>, scores.rows, stream, p);
        if (p.column_nearest.index) launch_warp_rows(search_exact_columns<S>, scores.columns, stream, p);
    });
}

} // namespace fm::cuda
