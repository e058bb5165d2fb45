// The search for the nearest rows in portable CUDA, for any GPU. A warp owns a row, a column or a query, with its list
// and its answers, and goes through the others in ascending order: results repeat bit for bit.
#include "cuda.h"
#include "row.h"

#include <limits>
#include <type_traits>

namespace fm::cuda {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kHighest = std::numeric_limits<float>::infinity(), kLowest = -kHighest;

__device__ inline float round_up(double x) { return nextafterf(static_cast<float>(x), kHighest); }
__device__ inline float round_down(double x) { return nextafterf(static_cast<float>(x), kLowest); }

// The one way in which two rows are multiplied when it counts. In double whatever their types, so its bits are the same
// in every kernel.
template <class S> __device__ double exact(const Row<S>& a, const Row<S>& b, int64_t size) {
    return warp_dot_of([&](int64_t d) { return a.template at<double>(d); },
                       [&](int64_t d) { return b.template at<double>(d); }, size);
}
__device__ inline double exact(const MatrixView& a, int64_t i, const MatrixView& b, int64_t j, int64_t size) {
    if (a.dtype == b.dtype)
        return dispatch_dtype(a.dtype, [&](auto s) { return exact(Row<decltype(s)>(a, i), {b, j}, size); });
    // rare: not worth a loop for every pair of types
    return warp_dot_of([&](int64_t d) { return element<double>(a, i, d); },
                       [&](int64_t d) { return element<double>(b, j, d); }, size);
}

template <class S> __global__ void encode_rows(EncodeRows p) {
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
    double squares = exact(elements, elements, p.size);
    double inverse = p.inner_product ? 1.0 : inverse_norm_of(squares);
    double step = length * inverse / 127.0;
    bool usable = step > 1e-30 && step < 1e30 && squares == squares; // not for zero, infinite and NaN rows
    T factor = usable ? static_cast<T>(inverse / step) : static_cast<T>(0);
    if (lane() == 0) p.scale[row] = usable ? static_cast<float>(step) : 0.0f;
    for (int64_t d = lane(); d < p.size; d += kWarp) {
        T scaled = usable ? elements.template at<T>(d) * factor : static_cast<T>(0);
        p.code[row * p.size + d] =
            static_cast<int8_t>(scaled < 0 ? scaled - static_cast<T>(0.5) : scaled + static_cast<T>(0.5));
    }
}

template <class S> __global__ void measure_codes(MeasureCodes p) {
    int64_t r = warp_row();
    if (r >= p.count) return;
    const Row<S> row(p.rows, r);
    double squares = exact(row, row, p.size), scale = static_cast<double>(p.scale[r]);
    double inverse = !p.inner_product ? inverse_norm_of(squares) : squares == 0.0 ? 0.0 : 1.0;
    double rest = 0.0, length = 0.0;
    for (int64_t d = lane(); d < p.size; d += kWarp) {
        double q = scale * element<double>(p.code, r, d);
        double difference = row.template at<double>(d) * inverse - q;
        rest += difference * difference;
        length += q * q;
    }
    rest = warp_sum(rest), length = warp_sum(length);
    if (lane() != 0) return;
    p.inverse_norm[r] = inverse;
    if (p.norm) p.norm[r] = round_up(sqrt(squares) * (1.0 + 1e-12));
    float longest = round_up(sqrt(length) * (1.0 + 1e-12));
    p.length[r] = longest;
    double error = sqrt(rest) * (1.0 + 1e-12) + 1e-13 + p.rounding * static_cast<double>(longest);
    p.error[r] = error == error ? round_up(error) : -1.0f;
}

// Where the rows and columns of a tile belong.
__device__ inline int64_t row_place(const ProductTile& t, int64_t r) {
    return t.row_place ? t.row_place[r] : t.row_begin + r;
}
__device__ inline int64_t row_number(const ProductTile& t, int64_t r) {
    return t.row_number ? t.row_number[r] : row_place(t, r);
}
__device__ inline int64_t column_number(const ProductTile& t, int64_t j) { return t.column_first + t.column_begin + j; }

template <class P> __device__ float product(const ProductTile& t, int64_t r, int64_t j) {
    return static_cast<float>(static_cast<const P*>(t.products)[r * t.columns + j]);
}

// Calls f(lane) for the lanes whose bit is set, in ascending order.
template <class F> __device__ void for_each_lane(unsigned lanes, F f) {
    for (; lanes; lanes &= lanes - 1) f(__ffs(static_cast<int>(lanes)) - 1);
}

// Takes a value above the ceiling into a list, behind its equals. The whole warp moves what is smaller, 32 at a time
// from the end. Returns the new ceiling.
__device__ inline float insert(const Lists& lists, int64_t place, int64_t number, float value) {
    int32_t* candidate = lists.candidate + place * lists.capacity;
    float* values = lists.value + place * lists.capacity;
    float ceiling = lists.ceiling[place], last = values[lists.capacity - 1];
    bool full = candidate[lists.capacity - 1] >= 0;
    __syncwarp(); // all have read what is written below
    if (full) {   // the least of all is left out
        float least = value < last ? value : last;
        ceiling = least > ceiling ? least : ceiling;
        if (lane() == 0) lists.ceiling[place] = ceiling;
        if (!(value > last)) {
            __syncwarp();
            return ceiling;
        }
    }
    int64_t end = lists.capacity; // of what has not moved, and is not smaller
    for (bool more = true; more;) {
        int64_t at = end - 1 - lane();
        float moved = at >= 0 ? values[at] : kHighest;
        int32_t owner = at >= 0 ? candidate[at] : -1;
        bool smaller = at >= 0 && moved < value;
        int count = __popc(__ballot_sync(kWholeWarp, smaller));
        __syncwarp(); // nobody writes before all have read
        if (smaller && at + 1 < lists.capacity) {
            values[at + 1] = moved;
            candidate[at + 1] = owner;
        }
        end -= count;
        more = count == kWarp;
    }
    __syncwarp();
    if (lane() == 0) {
        values[end] = value;
        candidate[end] = static_cast<int32_t>(number);
    }
    __syncwarp();
    return ceiling;
}

// Offers count values to one list, of whatever has the number `own`, which is nobody's in two sets.
template <class Value, class Number>
__device__ void offer(const Lists& lists, int64_t place, int64_t own, int64_t count, Value value_of, Number number_of) {
    float ceiling = lists.ceiling[place];
    for (int64_t begin = 0; begin < count; begin += kWarp) {
        int64_t at = begin + lane();
        float value = at < count && number_of(at) != own ? value_of(at) : kLowest;
        for_each_lane(__ballot_sync(kWholeWarp, value > ceiling), [&](int from) {
            float offered = __shfl_sync(kWholeWarp, value, from);
            if (offered > ceiling) ceiling = insert(lists, place, number_of(begin + from), offered);
        });
    }
}

template <class P> __global__ void offer_to_rows(OfferTile p) {
    const ProductTile& t = p.tile;
    int64_t r = warp_row();
    if (r >= t.rows) return;
    int64_t place = row_place(t, r);
    float own = p.row_scale[place];
    offer(
        p.of_rows, place, t.one_set ? row_number(t, r) : -1, t.columns,
        [&](int64_t j) { return product<P>(t, r, j) * (own * p.column_scale[t.column_begin + j]); },
        [&](int64_t j) { return column_number(t, j); });
}

// The columns of a block are neighbours, so its warps share the lines that they read of every row.
template <class P> __global__ void offer_to_columns(OfferTile p) {
    const ProductTile& t = p.tile;
    int64_t j = warp_row();
    if (j >= t.columns) return;
    int64_t place = t.column_begin + j;
    if (p.renewed && p.renewed[place]) return;
    float own = p.column_scale[place];
    offer(
        p.of_columns, place, t.one_set ? column_number(t, j) : -1, t.rows,
        [&](int64_t r) { return product<P>(t, r, j) * (p.row_scale[row_place(t, r)] * own); },
        [&](int64_t r) { return row_number(t, r); });
}

__global__ void forget_renewed(ForgetRenewed p) {
    int64_t i = warp_row();
    if (i >= p.count) return;
    const int64_t capacity = p.lists.capacity;
    int32_t* candidate = p.lists.candidate + i * capacity;
    float* value = p.lists.value + i * capacity;
    bool renewed = p.renewed_rows[i];
    if (renewed && lane() == 0) {
        float& ceiling = p.lists.ceiling[i];
        ceiling = candidate[0] >= 0 && value[0] > ceiling ? ceiling - 0.25f * (value[0] - ceiling) : kLowest;
    }
    __syncwarp(); // the first value is written below
    int64_t kept = 0;
    for (int64_t begin = 0; begin < capacity; begin += kWarp) {
        int64_t c = begin + lane();
        int32_t number = c < capacity ? candidate[c] : -1;
        float known = c < capacity ? value[c] : kLowest;
        unsigned stay = __ballot_sync(kWholeWarp, number >= 0 && !renewed && !p.renewed_candidates[number]);
        __syncwarp(); // nobody writes before all have read
        if (c < capacity) candidate[c] = -1, value[c] = kLowest;
        __syncwarp(); // the empty places come first: some are filled again
        if (stay >> lane() & 1) {
            int64_t to = kept + __popc(stay & ((1u << lane()) - 1));
            candidate[to] = number;
            value[to] = known;
        }
        kept += __popc(stay);
        __syncwarp();
    }
}

// Makes (cosine, index) one of the k answers if it is; NaN is none. For one lane.
__device__ inline void answer_alone(const Answers& answers, int64_t query, double cosine, int64_t index) {
    double* cosines = answers.cosine + query * answers.count;
    int64_t* indices = answers.index + query * answers.count;
    auto before = [&](int64_t at) { return cosine > cosines[at] || (cosine == cosines[at] && index < indices[at]); };
    int64_t at = answers.count - 1;
    if (indices[at] >= 0 ? !before(at) : !(cosine > -kInfinity)) return;
    for (int64_t k = 0; k < answers.count; ++k)
        if (indices[k] == index) return;
    for (; at > 0 && (indices[at - 1] < 0 || before(at - 1)); --at) {
        cosines[at] = cosines[at - 1];
        indices[at] = indices[at - 1];
    }
    cosines[at] = cosine;
    indices[at] = index;
}

// The least of the answers so far.
__device__ inline double worst_of(const Answers& answers, int64_t query) {
    return answers.cosine[(query + 1) * answers.count - 1];
}

// The same for a whole warp. Returns the least of the answers.
__device__ inline double answer(const Answers& answers, int64_t query, double cosine, int64_t index) {
    __syncwarp(); // all have read the least of before
    if (lane() == 0) answer_alone(answers, query, cosine, index);
    __syncwarp();
    return worst_of(answers, query);
}

__device__ inline double cosine_of(const Coded& query, int64_t i, const Coded& reference, int64_t j, int64_t size) {
    return exact(query.rows, i, reference.rows, j, size) * (query.inverse_norm[i] * reference.inverse_norm[j]);
}

// Whether a query has the same cosine to all references: NaN, or 0 for a zero row.
__device__ inline bool is_same_to_all(const Coded& query, int64_t i) {
    return query.error[i] < 0.0f || query.inverse_norm[i] == 0.0;
}

// How far a product of codes can be from what it stands for: (*) in search.h.
__device__ inline double uncertainty(const Coded& query, int64_t i, const Coded& reference, int64_t j) {
    double norm = reference.norm ? static_cast<double>(reference.norm[j]) : 1.0;
    return static_cast<double>(query.error[i]) * norm +
           static_cast<double>(query.length[i]) * static_cast<double>(reference.error[j]);
}

// The answers of a query of that kind: the first references. For one lane.
__device__ inline void same_to_all(const SettleCandidates& p, int64_t i) {
    const int64_t k = p.answers.count, self = p.one_set ? p.query_first + i : -1;
    const bool nan = p.query.error[i] < 0.0f;
    int64_t found = 0;
    for (int64_t j = 0; !p.reference_place && j < p.references && found < k; ++j) {
        int64_t number = p.reference_first + j;
        if (number == self || (!nan && p.reference.error[j] < 0.0f)) continue;
        answer_alone(p.answers, i, 0.0, number);
        ++found;
    }
    for (int64_t c = 0; nan && c < k; ++c) p.answers.cosine[i * k + c] = std::numeric_limits<double>::quiet_NaN();
}

__global__ void settle_candidates(SettleCandidates p) {
    int64_t i = warp_row();
    if (i >= p.queries) return;
    if (is_same_to_all(p.query, i)) {
        if (lane() == 0) same_to_all(p, i);
        return;
    }
    double worst = worst_of(p.answers, i);
    const int32_t* candidate = p.lists.candidate + i * p.lists.capacity;
    const float* value = p.lists.value + i * p.lists.capacity;
    for (int64_t c = 0; c < p.lists.capacity && candidate[c] >= 0; ++c) {
        int64_t place = p.reference_place ? p.reference_place[candidate[c]] : candidate[c] - p.reference_first;
        if (place < 0 || place >= p.references) continue;
        if (static_cast<double>(value[c]) + uncertainty(p.query, i, p.reference, place) < worst) continue;
        worst = answer(p.answers, i, cosine_of(p.query, i, p.reference, place, p.size), candidate[c]);
    }
}

// Looks at those of count others that may be among the nearest of one row or column of a tile, which asks.
template <class Value, class Place, class Number>
__device__ void resolve(const Coded& asking, int64_t i, const Answers& answers, int64_t own, const Coded& others,
                        int64_t count, int64_t size, Value value_of, Place place_of, Number number_of) {
    if (is_same_to_all(asking, i)) return; // settled
    double worst = worst_of(answers, i);
    const float error = asking.error[i], length = asking.length[i];
    for (int64_t begin = 0; begin < count; begin += kWarp) {
        int64_t at = begin + lane();
        float most = kLowest; // that the cosine can be
        bool other = at < count && number_of(at) != own;
        if (other) {
            int64_t place = place_of(at);
            most = value_of(at) + (error * (others.norm ? others.norm[place] : 1.0f) + length * others.error[place]);
        }
        for_each_lane(__ballot_sync(kWholeWarp, other && most >= round_down(worst)), [&](int from) {
            if (!(__shfl_sync(kWholeWarp, most, from) >= round_down(worst))) return;
            double cosine = cosine_of(asking, i, others, place_of(begin + from), size);
            worst = answer(answers, i, cosine, number_of(begin + from));
        });
    }
}

template <class P> __global__ void resolve_rows(ResolveTile p) {
    const ProductTile& t = p.tile;
    int64_t r = warp_row();
    if (r >= t.rows) return;
    const int64_t i = row_place(t, r);
    const float own = p.query.scale[i];
    resolve(
        p.query, i, p.of_rows, t.one_set ? row_number(t, r) : -1, p.reference, t.columns, p.size,
        [&](int64_t j) { return product<P>(t, r, j) * (own * p.reference.scale[t.column_begin + j]); },
        [&](int64_t j) { return t.column_begin + j; }, [&](int64_t j) { return column_number(t, j); });
}

template <class P> __global__ void resolve_columns(ResolveTile p) {
    const ProductTile& t = p.tile;
    int64_t j = warp_row();
    if (j >= t.columns) return;
    const int64_t i = t.column_begin + j;
    if (p.renewed && p.renewed[i]) return;
    const float own = p.reference.scale[i];
    resolve(
        p.reference, i, p.of_columns, t.one_set ? column_number(t, j) : -1, p.query, t.rows, p.size,
        [&](int64_t r) { return product<P>(t, r, j) * (p.query.scale[row_place(t, r)] * own); },
        [&](int64_t r) { return row_place(t, r); }, [&](int64_t r) { return row_number(t, r); });
}

// Calls f with a zero of the products' type.
template <class F> void as_product_type(const ProductTile& tile, F f) {
    switch (tile.type) {
    case ProductTile::integer: return f(int32_t{});
    case ProductTile::single: return f(float{});
    default: return f(double{});
    }
}

} // namespace

void run(const EncodeRows& p, void* stream) {
    dispatch_dtype(p.rows.dtype, [&](auto s) { launch_warp_rows(encode_rows<decltype(s)>, p.count, stream, p); });
}
void run(const MeasureCodes& p, void* stream) {
    dispatch_dtype(p.rows.dtype, [&](auto s) { launch_warp_rows(measure_codes<decltype(s)>, p.count, stream, p); });
}
void run(const OfferTile& p, void* stream) {
    as_product_type(p.tile, [&](auto type) {
        if (p.of_rows.candidate) launch_warp_rows(offer_to_rows<decltype(type)>, p.tile.rows, stream, p);
        if (p.of_columns.candidate) launch_warp_rows(offer_to_columns<decltype(type)>, p.tile.columns, stream, p);
    });
}
void run(const ForgetRenewed& p, void* stream) { launch_warp_rows(forget_renewed, p.count, stream, p); }
void run(const SettleCandidates& p, void* stream) { launch_warp_rows(settle_candidates, p.queries, stream, p); }
void run(const ResolveTile& p, void* stream) {
    as_product_type(p.tile, [&](auto type) {
        if (p.of_rows.index) launch_warp_rows(resolve_rows<decltype(type)>, p.tile.rows, stream, p);
        if (p.of_columns.index) launch_warp_rows(resolve_columns<decltype(type)>, p.tile.columns, stream, p);
    });
}

} // namespace fm::cuda
