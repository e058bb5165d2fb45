// The CPU kernels of the search for the nearest rows. Compiled once per instruction set, as kernels.cpp is.
#include "rows.h"

#include <cstring>
#include <limits>

namespace fm::cpu::FM_ISA {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr float kLowest = -std::numeric_limits<float>::infinity();
constexpr int kBlock = 64; // products looked at together

inline float round_up(double x) { return nextafterf(static_cast<float>(x), std::numeric_limits<float>::infinity()); }

// A float below x, by a few bits: as round_up, and without a branch.
inline float below(double x) {
    float nearest = static_cast<float>(x);
    return nearest - fabsf(nearest) * 0x1p-22f;
}

// The one way in which two rows are multiplied when it counts; never inlined, so that its bits are always the same.
template <class T> __attribute__((noinline)) double exact(const T* a, const T* b, int64_t size) {
    return dot(a, b, size);
}

// Calls f(float{}) or f(double{}): the type rows are computed in.
template <class F> inline void as_compute_type(const MatrixView& rows, F f) {
    if (rows.dtype == Dtype::float64)
        f(double{});
    else
        f(float{});
}

template <class T> void encode_rows(const EncodeRows& p) {
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
            double squares = exact(x, x, p.size); // NaN if one element is, which the largest need not show
            double inverse = p.inner_product ? 1.0 : inverse_norm_of(squares);
            double step = static_cast<double>(largest) * inverse / 127.0;
            bool usable = step > 1e-30 && step < 1e30 && squares == squares; // not for zero, infinite and NaN rows
            T factor = usable ? static_cast<T>(inverse / step) : static_cast<T>(0);
            int8_t* code = p.code + row * p.size;
            p.scale[row] = usable ? static_cast<float>(step) : 0.0f;
            for (int64_t d = 0; d < p.size; ++d) {
                T scaled = usable ? x[d] * factor : static_cast<T>(0);
                code[d] = static_cast<int8_t>(scaled < 0 ? scaled - static_cast<T>(0.5) : scaled + static_cast<T>(0.5));
            }
        }
    }
}

template <class T, class Code> void measure_codes(const MeasureCodes& p) {
#pragma omp parallel num_threads(threads_for(p.count* p.size))
    {
        Scratch<T> buffer(p.size);
        Scratch<Code> other(p.size);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < p.count; ++r) {
            const T* x = load_row<T>(p.rows, r, p.size, buffer);
            const Code* code = load_row<Code>(p.code, r, p.size, other);
            double squares = exact(x, x, p.size), scale = static_cast<double>(p.scale[r]);
            double inverse = !p.inner_product ? inverse_norm_of(squares) : squares == 0.0 ? 0.0 : 1.0;
            double rest = 0.0, length = 0.0;
#pragma omp simd reduction(+ : rest, length)
            for (int64_t d = 0; d < p.size; ++d) {
                double q = scale * static_cast<double>(code[d]);
                double difference = static_cast<double>(x[d]) * inverse - q;
                rest += difference * difference;
                length += q * q;
            }
            p.inverse_norm[r] = inverse;
            if (p.norm) p.norm[r] = round_up(sqrt(squares) * (1.0 + 1e-12));
            p.length[r] = round_up(sqrt(length) * (1.0 + 1e-12));
            double error = sqrt(rest) * (1.0 + 1e-12) + 1e-13 + p.rounding * static_cast<double>(p.length[r]);
            p.error[r] = error == error ? round_up(error) : -1.0f;
        }
    }
}

// Where the rows and columns of a tile belong.
inline int64_t row_place(const ProductTile& t, int64_t r) { return t.row_place ? t.row_place[r] : t.row_begin + r; }
inline int64_t row_number(const ProductTile& t, int64_t r) { return t.row_number ? t.row_number[r] : row_place(t, r); }

inline void insert(const Lists& lists, int64_t place, int64_t number, float value) {
    int32_t* candidate = lists.candidate + place * lists.capacity;
    float* values = lists.value + place * lists.capacity;
    float& ceiling = lists.ceiling[place];
    const int64_t at = lists.capacity - 1;
    if (candidate[at] >= 0) { // full: the least of all is left out
        float least = value < values[at] ? value : values[at];
        ceiling = least > ceiling ? least : ceiling;
        if (!(value > values[at])) return;
    }
    int64_t before = 0;
#pragma omp simd reduction(+ : before)
    for (int64_t c = 0; c < at; ++c) before += values[c] >= value ? 1 : 0;
    memmove(values + before + 1, values + before, static_cast<size_t>(at - before) * sizeof(float));
    memmove(candidate + before + 1, candidate + before, static_cast<size_t>(at - before) * sizeof(int32_t));
    values[before] = value;
    candidate[before] = static_cast<int32_t>(number);
}

// Calls visit(j), ascending, for the j < count <= kBlock that pass the test.
template <class Test, class Visit> inline void where(int64_t count, Test test, Visit visit) {
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

template <class P> void offer_to_rows(const OfferTile& p, const P* products) {
    const ProductTile& t = p.tile;
    const float* scale = p.column_scale + t.column_begin;
#pragma omp parallel for schedule(dynamic, 8) num_threads(threads_for(t.rows* t.columns))
    for (int64_t r = 0; r < t.rows; ++r) {
        const P* row = products + r * t.columns;
        int64_t place = row_place(t, r), first = t.column_first + t.column_begin;
        int64_t self = t.one_set ? row_number(t, r) - first : -1;
        const float own = p.row_scale[place], &ceiling = p.of_rows.ceiling[place];
        auto value = [=](int64_t j) { return static_cast<float>(row[j]) * (own * scale[j]); };
        for (int64_t begin = 0; begin < t.columns; begin += kBlock) { // the ceiling rises from block to block
            const float least = ceiling;
            where(
                begin + kBlock < t.columns ? kBlock : t.columns - begin,
                [=](int64_t j) { return value(begin + j) > least; },
                [&](int64_t j) {
                    if (value(begin + j) > ceiling && begin + j != self)
                        insert(p.of_rows, place, first + begin + j, value(begin + j));
                });
        }
    }
}

// Calls f(first, count) for the blocks of a tile's columns, each on one thread.
template <class F> void for_each_column_block(const ProductTile& t, F f) {
    const int64_t blocks = (t.columns + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads_for(t.rows* t.columns))
    for (int64_t block = 0; block < blocks; ++block) {
        int64_t begin = block * kBlock;
        f(begin, t.columns - begin < kBlock ? t.columns - begin : kBlock);
    }
}

template <class P> void offer_to_columns(const OfferTile& p, const P* products) {
    const ProductTile& t = p.tile;
    for_each_column_block(t, [&](int64_t begin, int64_t count) {
        const int64_t place = t.column_begin + begin;
        const float *scale = p.column_scale + place, *ceiling = p.of_columns.ceiling + place;
        for (int64_t r = 0; r < t.rows; ++r) {
            const P* row = products + r * t.columns + begin;
            const float own = p.row_scale[row_place(t, r)];
            auto value = [=](int64_t j) { return static_cast<float>(row[j]) * (own * scale[j]); };
            where(
                count, [=](int64_t j) { return value(j) > ceiling[j]; },
                [&](int64_t j) {
                    int64_t number = row_number(t, r);
                    bool self = t.one_set && number == t.column_first + place + j;
                    if (!self && !(p.renewed && p.renewed[place + j]))
                        insert(p.of_columns, place + j, number, value(j));
                });
        }
    });
}

template <class P> void offer_tile(const OfferTile& p) {
    const P* products = static_cast<const P*>(p.tile.products);
    if (p.of_rows.candidate) offer_to_rows(p, products);
    if (p.of_columns.candidate) offer_to_columns(p, products);
}

// Calls f with a null pointer of the products' type.
template <class F> inline void as_product_type(const ProductTile& tile, F f) {
    switch (tile.type) {
    case ProductTile::integer: return f(static_cast<const int32_t*>(nullptr));
    case ProductTile::single: return f(static_cast<const float*>(nullptr));
    default: return f(static_cast<const double*>(nullptr));
    }
}

void forget_renewed(const ForgetRenewed& p) {
    const int64_t capacity = p.lists.capacity;
#pragma omp parallel for schedule(static) num_threads(threads_for(p.count* capacity))
    for (int64_t i = 0; i < p.count; ++i) {
        int32_t* candidate = p.lists.candidate + i * capacity;
        float* value = p.lists.value + i * capacity;
        if (p.renewed_rows[i]) {
            float& ceiling = p.lists.ceiling[i];
            ceiling = candidate[0] >= 0 && value[0] > ceiling ? ceiling - 0.25f * (value[0] - ceiling) : kLowest;
        }
        int64_t kept = 0;
        for (int64_t c = 0; c < capacity && candidate[c] >= 0; ++c) {
            if (p.renewed_rows[i] || p.renewed_candidates[candidate[c]]) continue;
            candidate[kept] = candidate[c];
            value[kept++] = value[c];
        }
        for (; kept < capacity && candidate[kept] >= 0; ++kept) candidate[kept] = -1, value[kept] = kLowest;
    }
}

// Makes (cosine, index) one of the k answers if it is; NaN is none.
inline void answer(const Answers& answers, int64_t query, double cosine, int64_t index) {
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

// Cosines of one query with references, in the type T of the loaded rows.
template <class T> struct Comparison {
    const Coded &query, &reference;
    const int64_t size;
    Scratch<T> own_buffer, other_buffer;
    const T* own = nullptr;
    double inverse = 0.0;
    Comparison(const Coded& q, const Coded& r, int64_t s)
        : query(q), reference(r), size(s), own_buffer(s), other_buffer(s) {}
    void begin(int64_t place) {
        own = load_row<T>(query.rows, place, size, own_buffer);
        inverse = query.inverse_norm[place];
    }
    double with(int64_t place) const {
        return exact(own, load_row<T>(reference.rows, place, size, other_buffer), size) *
               (inverse * reference.inverse_norm[place]);
    }
};

// How far a product of codes can be from what it stands for: (*) in search.h.
inline double uncertainty(const Coded& query, int64_t i, const Coded& reference, int64_t j) {
    double norm = reference.norm ? static_cast<double>(reference.norm[j]) : 1.0;
    return static_cast<double>(query.error[i]) * norm +
           static_cast<double>(query.length[i]) * static_cast<double>(reference.error[j]);
}

// The answers of a query whose cosine is the same to all references: NaN, or 0 for a zero row.
inline void same_to_all(const SettleCandidates& p, int64_t i) {
    const int64_t k = p.answers.count, self = p.one_set ? p.query_first + i : -1;
    const bool nan = p.query.error[i] < 0.0f;
    int64_t found = 0;
    for (int64_t j = 0; !p.reference_place && j < p.references && found < k; ++j) {
        int64_t number = p.reference_first + j;
        if (number == self || (!nan && p.reference.error[j] < 0.0f)) continue;
        answer(p.answers, i, 0.0, number);
        ++found;
    }
    for (int64_t c = 0; nan && c < k; ++c) p.answers.cosine[i * k + c] = std::numeric_limits<double>::quiet_NaN();
}

template <class T> void settle_candidates(const SettleCandidates& p) {
    const int64_t k = p.answers.count;
#pragma omp parallel num_threads(threads_for(p.queries* p.size))
    {
        Comparison<T> compare(p.query, p.reference, p.size);
#pragma omp for schedule(dynamic, 64)
        for (int64_t i = 0; i < p.queries; ++i) {
            compare.begin(i);
            if (p.query.error[i] < 0.0f || compare.inverse == 0.0) {
                same_to_all(p, i);
                continue;
            }
            const double& worst = p.answers.cosine[i * k + k - 1];
            const int32_t* candidate = p.lists.candidate + i * p.lists.capacity;
            const float* value = p.lists.value + i * p.lists.capacity;
            for (int64_t c = 0; c < p.lists.capacity && candidate[c] >= 0; ++c) {
                int64_t place = p.reference_place ? p.reference_place[candidate[c]] : candidate[c] - p.reference_first;
                if (place < 0 || place >= p.references) continue;
                if (static_cast<double>(value[c]) + uncertainty(p.query, i, p.reference, place) < worst) continue;
                answer(p.answers, i, compare.with(place), candidate[c]);
            }
        }
    }
}

template <class T, bool with_norm, class P> void resolve_rows(const ResolveTile& p, const P* products) {
    const ProductTile& t = p.tile;
    const int64_t k = p.of_rows.count, first = t.column_first + t.column_begin;
    const float *scale = p.reference.scale + t.column_begin, *error = p.reference.error + t.column_begin;
    const float* norm = with_norm ? p.reference.norm + t.column_begin : nullptr;
#pragma omp parallel num_threads(threads_for(t.rows* t.columns))
    {
        Comparison<T> compare(p.query, p.reference, p.size);
#pragma omp for schedule(dynamic, 4)
        for (int64_t r = 0; r < t.rows; ++r) {
            const P* row = products + r * t.columns;
            const int64_t place = row_place(t, r), self = t.one_set ? row_number(t, r) - first : -1;
            compare.begin(place);
            if (p.query.error[place] < 0.0f || compare.inverse == 0.0) continue; // settled: the same to all
            const double& worst = p.of_rows.cosine[place * k + k - 1];
            const float own = p.query.scale[place], own_error = p.query.error[place], length = p.query.length[place];
            auto most = [=](int64_t j) { // that the cosine can be
                float bound = (with_norm ? own_error * norm[j] : own_error) + length * error[j];
                return static_cast<float>(row[j]) * (own * scale[j]) + bound;
            };
            for (int64_t begin = 0; begin < t.columns; begin += kBlock) { // the worst rises from block to block
                const float least = below(worst);
                where(
                    begin + kBlock < t.columns ? kBlock : t.columns - begin,
                    [=](int64_t j) { return most(begin + j) >= least; },
                    [&](int64_t j) {
                        if (most(begin + j) >= below(worst) && begin + j != self)
                            answer(p.of_rows, place, compare.with(t.column_begin + begin + j), first + begin + j);
                    });
            }
        }
    }
}

template <class T, class P> void resolve_columns(const ResolveTile& p, const P* products) {
    const ProductTile& t = p.tile;
    const int64_t k = p.of_columns.count;
    for_each_column_block(t, [&](int64_t begin, int64_t count) {
        const int64_t first = t.column_begin + begin;
        const float *scale = p.reference.scale + first, *error = p.reference.error + first;
        const float* length = p.reference.length + first;
        Comparison<T> compare(p.reference, p.query, p.size); // the columns are the ones who ask
        float least[kBlock];
        for (int64_t j = 0; j < count; ++j) {
            int64_t place = first + j;
            bool settled = error[j] < 0.0f || p.reference.inverse_norm[place] == 0.0; // the same to all
            bool asks = !settled && !(p.renewed && p.renewed[place]);
            least[j] = asks ? below(p.of_columns.cosine[place * k + k - 1]) : std::numeric_limits<float>::infinity();
        }
        for (int64_t r = 0; r < t.rows; ++r) {
            const P* row = products + r * t.columns + begin;
            const int64_t place = row_place(t, r), number = row_number(t, r);
            const float own = p.query.scale[place], own_error = p.query.error[place];
            const float norm = p.query.norm ? p.query.norm[place] : 1.0f;
            where(
                count,
                [=, least = &least[0]](int64_t j) {
                    float bound = error[j] * norm + length[j] * own_error;
                    return static_cast<float>(row[j]) * (own * scale[j]) + bound >= least[j];
                },
                [&](int64_t j) {
                    if (t.one_set && number == t.column_first + first + j) return;
                    compare.begin(first + j);
                    answer(p.of_columns, first + j, compare.with(place), number);
                    least[j] = below(p.of_columns.cosine[(first + j) * k + k - 1]);
                });
        }
    });
}

template <class T, class P> void resolve_tile(const ResolveTile& p) {
    const P* products = static_cast<const P*>(p.tile.products);
    if (p.of_rows.index) {
        if (p.reference.norm)
            resolve_rows<T, true>(p, products);
        else
            resolve_rows<T, false>(p, products);
    }
    if (p.of_columns.index) resolve_columns<T>(p, products);
}

} // namespace

void run(const EncodeRows& p) {
    as_compute_type(p.rows, [&](auto t) { encode_rows<decltype(t)>(p); });
}
void run(const MeasureCodes& p) {
    as_compute_type(p.rows, [&](auto t) {
        if (p.code.dtype == Dtype::int8)
            measure_codes<decltype(t), int8_t>(p);
        else
            measure_codes<decltype(t), decltype(t)>(p);
    });
}
void run(const OfferTile& p) {
    as_product_type(
        p.tile, [&](auto product) { offer_tile<std::remove_const_t<std::remove_pointer_t<decltype(product)>>>(p); });
}
void run(const ForgetRenewed& p) { forget_renewed(p); }
void run(const SettleCandidates& p) {
    as_compute_type(p.query.rows, [&](auto t) { settle_candidates<decltype(t)>(p); });
}
void run(const ResolveTile& p) {
    as_compute_type(p.query.rows, [&](auto t) {
        as_product_type(p.tile, [&](auto product) {
            resolve_tile<decltype(t), std::remove_const_t<std::remove_pointer_t<decltype(product)>>>(p);
        });
    });
}

} // namespace fm::cpu::FM_ISA
