// The epilogues: operations on a tile of cosines in registers, shared by both tensor-core families.
//
// A warp holds M blocks of 16 rows, `Stride` rows apart, by N blocks of 8 columns, in the layout of both mma and wgmma:
// this thread's element (m, n, h, e) has row `row + m * Stride + 8 h` and column `column + 8 n + e`, where row includes
// lane / 4 and column includes 2 (lane % 4).
#pragma once

#include "logit.h"
#include "warp.h"

namespace fm::cuda {

template <int M, int N> using Accumulators = float[M][4 * N];

template <int Stride> __device__ int row_offset(int r) { return (r >> 1) * Stride + (r & 1) * 8; }

template <int Stride, class Params> __device__ Logit logit_of(const Params& p, int row, int r) {
    int at = row + row_offset<Stride>(r);
    return at < p.product.rows ? Logit{p.prepared[at].high, p.prepared[at].low} : Logit{0.0f, 0.0f};
}

// The index of element i of this thread's row r among its accumulators.
__device__ constexpr int element_of(int r, int i) { return (i >> 1) * 4 + (r & 1) * 2 + (i & 1); }
// The column of element i, relative to `column`.
__device__ constexpr int column_offset(int i) { return (i >> 1) * 8 + (i & 1); }

// Masks the labels' own columns, and those beyond the last class, in a tile. Few tiles have any.
template <int M, int N, int Stride, class Params>
__device__ void mask_columns(const Params& p, Accumulators<M, N>& products, int row, int begin, int column) {
    int columns = static_cast<int>(p.product.columns), class_begin = static_cast<int>(p.class_begin);
    int target[2 * M]; // the label's column relative to this chunk, which need not contain it
    bool any = begin + 8 * N > columns;
    FM_UNROLL
    for (int r = 0; r < 2 * M; ++r) {
        int at = row + row_offset<Stride>(r);
        target[r] = at < p.product.rows ? p.prepared[at].label - class_begin : -1;
        any |= static_cast<unsigned>(target[r] - begin) < static_cast<unsigned>(8 * N);
    }
    if (!__any_sync(kWholeWarp, any)) return;
    FM_UNROLL
    for (int r = 0; r < 2 * M; ++r) {
        FM_UNROLL
        for (int i = 0; i < 2 * N; ++i) {
            int j = column + column_offset(i);
            if (j == target[r] || j >= columns) products[r >> 1][element_of(r, i)] = kMasked<float>;
        }
    }
}

template <int M, int N, int Stride> struct DumpEpilogue {
    using Params = TensorDump;

    __device__ void begin(const Params&, int) {}
    __device__ void tile(const Params& p, Accumulators<M, N>& products, int row, int, int column, int) {
        FM_UNROLL
        for (int r = 0; r < 2 * M; ++r) {
            int64_t i = row + row_offset<Stride>(r);
            FM_UNROLL
            for (int c = 0; c < 2 * N; ++c) {
                int j = column + column_offset(c);
                if (i < p.product.rows && j < p.product.columns)
                    p.out[i * p.product.columns + j] = products[r >> 1][element_of(r, c)];
            }
        }
    }
    __device__ void end(const Params&, int, int, int) {}
};

template <int M, int N, int Stride, bool Online> struct ExponentSumEpilogue {
    static constexpr int kRows = 2 * M;

    struct Params : TensorExponentSum {
        Logit shared; // of all rows, unless each has its own
        float exponent;
        Params(const TensorExponentSum& p) // NOLINT: implicit on purpose
            : TensorExponentSum(p), shared(Logit::of(p.scale_value)),
              exponent(static_cast<float>(p.fixed_exponent.value)) {}
    };

    float sum[kRows];
    float top[Online ? kRows : 1]; // the exponent that sum is relative to

    __device__ void begin(const Params& p, int row) {
        FM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            int at = row + row_offset<Stride>(r);
            sum[r] = 0.0f;
            if (Online) top[r] = at < p.product.rows ? p.prepared[at].exponent : 0.0f; // below every logit
        }
    }

    __device__ void tile(const Params& p, Accumulators<M, N>& products, int row, int begin, int column, int) {
        mask_columns<M, N, Stride>(p, products, row, begin, column);
        FM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            Logit logit = p.shared;
            float k = p.exponent;
            if (Online) {
                logit = logit_of<Stride>(p, row, r);
                float largest = kMasked<float>;
                FM_UNROLL
                for (int i = 0; i < 2 * N; ++i) largest = fmaxf(largest, products[r >> 1][element_of(r, i)]);
                k = fmaxf(top[r], rintf(logit(largest, 0.0f)));
                sum[r] *= exp2_approx(top[r] - k);
                top[r] = k;
            }
            float added = 0.0f; // the sum of this tile alone: short sums have small rounding errors
            FM_UNROLL
            for (int i = 0; i < 2 * N; ++i) added += exp2_approx(logit(products[r >> 1][element_of(r, i)], k));
            sum[r] += added;
        }
    }

    __device__ void end(const Params& p, int row, int slot, int lane) {
        FM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            Partial own{sum[r], Online ? top[r] : p.exponent};
            FM_UNROLL
            for (int mask = 1; mask <= 2; mask *= 2)
                own = merged(
                    own, {__shfl_xor_sync(kWholeWarp, own.sum, mask), __shfl_xor_sync(kWholeWarp, own.exponent, mask)});
            int64_t to = row + row_offset<Stride>(r);
            if (lane % 4 == 0 && to < p.product.rows) {
                Partial* partial = p.partial + static_cast<int64_t>(slot) * p.product.rows + to;
                *partial = merged(*partial, own);
            }
        }
    }

private:
    __device__ static Partial merged(Partial a, Partial b) {
        if (a.sum == 0.0f || b.sum == 0.0f) return {a.sum + b.sum, a.sum == 0.0f ? b.exponent : a.exponent};
        float k = fmaxf(a.exponent, b.exponent);
        return {a.sum * exp2_approx(a.exponent - k) + b.sum * exp2_approx(b.exponent - k), k};
    }
};

template <int M, int N, int Stride, bool Split> struct ProbabilitiesEpilogue {
    using Params = TensorProbabilities;
    static constexpr int kRows = 2 * M;

    __device__ void begin(const Params&, int) {}

    __device__ void tile(const Params& p, Accumulators<M, N>& products, int row, int begin, int column, int lane) {
        mask_columns<M, N, Stride>(p, products, row, begin, column);
        int quad = lane % 4;
        FM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            int64_t to_row = row + row_offset<Stride>(r);
            Logit logit = logit_of<Stride>(p, row, r);
            float k = to_row < p.product.rows ? p.prepared[to_row].exponent - kProbabilityBits : 0.0f;
            FM_UNROLL
            for (int n = 0; n < N; n += 4) { // 32 columns at a time, 8 of them in this thread
                float value[8];
                FM_UNROLL
                for (int i = 0; i < 8; ++i)
                    value[i] = exp2_approx(logit(products[r >> 1][element_of(r, 2 * n + i)], k));
                // the four lanes of a row exchange columns, so that each can store 8 adjacent ones
                int to_column = begin + 8 * (n + quad);
                bool inside = to_row < p.product.rows && to_column < p.stride;
                uint16_t* to = p.probabilities + to_row * p.stride + to_column;
                uint32_t words[4];
                FM_UNROLL
                for (int i = 0; i < 4; ++i) words[i] = pack_half(value[2 * i], value[2 * i + 1]);
                if (Split) {
                    uint32_t rest[4];
                    FM_UNROLL
                    for (int i = 0; i < 4; ++i)
                        rest[i] = pack_half(value[2 * i] - low_half(words[i]), value[2 * i + 1] - high_half(words[i]));
                    transpose(rest, quad);
                    if (inside) store_16_bytes(to + p.low, rest);
                }
                transpose(words, quad);
                if (inside) store_16_bytes(to, words);
            }
        }
    }

    __device__ void end(const Params&, int, int, int) {}

private:
    static constexpr float kProbabilityBits = 15.0f; // log2 of kProbabilityScale
    static_assert(kProbabilityScale == 1 << 15);

    // Transposes 4 x 4 words across the four lanes of a row: lane q receives word q of every lane, which are adjacent.
    __device__ static void transpose(uint32_t (&w)[4], int quad) {
        exchange(w[0], w[1], quad & 1, 1);
        exchange(w[2], w[3], quad & 1, 1);
        exchange(w[0], w[2], quad & 2, 2);
        exchange(w[1], w[3], quad & 2, 2);
    }
    __device__ static void exchange(uint32_t& a, uint32_t& b, bool upper, int mask) {
        uint32_t got = __shfl_xor_sync(kWholeWarp, upper ? a : b, mask);
        (upper ? a : b) = got;
    }
};

// An unsigned integer that orders like the float. No cosine maps to 0.
__device__ inline uint32_t ordered(float value) {
    uint32_t bits = bits_of(value);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ inline unsigned long long nearest_key(float product, int64_t index) {
    return static_cast<unsigned long long>(ordered(product)) << 32 | (0xffffffffu - static_cast<uint32_t>(index));
}

template <int M, int N, int Stride> struct NearestEpilogue {
    using Params = TensorNearest;
    static constexpr int kRows = 2 * M;

    float best[kRows];
    int index[kRows];

    __device__ void begin(const Params&, int) {
        FM_UNROLL
        for (int r = 0; r < kRows; ++r) best[r] = kMasked<float>, index[r] = 0;
    }

    __device__ void tile(const Params& p, Accumulators<M, N>& products, int row, int begin, int column, int lane) {
        int columns = static_cast<int>(p.product.columns), rows = static_cast<int>(p.product.rows);
        uint32_t stored[N / 4];
        if (N > 4) load_stored(p, begin, lane, stored);
        // the column at which the diagonal crosses row 0; far to the left if the chunks are not the same
        int diagonal = p.row_begin == p.column_begin ? 0 : -(1 << 30);
        int last_row = row - lane / 4 + (M - 1) * Stride + 15;
        if (begin <= last_row + diagonal || begin + 8 * N > columns || last_row >= rows) {
            FM_UNROLL
            for (int r = 0; r < kRows; ++r) {
                int i = row + row_offset<Stride>(r);
                FM_UNROLL
                for (int c = 0; c < 2 * N; ++c) {
                    int j = column + column_offset(c);
                    if (j <= i + diagonal || j >= columns || i >= rows)
                        products[r >> 1][element_of(r, c)] = kMasked<float>;
                }
            }
        }
        update_rows(products, column);
        if (N == 4) load_stored(p, begin, lane, stored); // one load; sm80 has no free register for it earlier
        update_columns(p, products, stored, row, column, lane);
    }

    __device__ void end(const Params& p, int row, int, int lane) {
        FM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            int64_t i = row + row_offset<Stride>(r);
            if (lane % 4 == 0 && i < p.product.rows && best[r] > kMasked<float>)
                atomicMax(p.best + p.row_begin + i, nearest_key(best[r], p.column_begin + index[r]));
        }
    }

private:
    // Tiles come in ascending columns, so only a greater product replaces an earlier one.
    __device__ void update_rows(const Accumulators<M, N>& products, int column) {
        FM_UNROLL
        for (int r = 0; r < kRows; ++r) {
            float largest = kMasked<float>;
            FM_UNROLL
            for (int i = 0; i < 2 * N; ++i) largest = fmaxf(largest, products[r >> 1][element_of(r, i)]);
            largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 1));
            largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, 2));
            if (!__any_sync(kWholeWarp, largest > best[r])) continue; // usual: the index need not be found
            int found = 0x7fffffff;
            FM_UNROLL
            for (int i = 2 * N - 1; i >= 0; --i)
                if (products[r >> 1][element_of(r, i)] == largest) found = column + column_offset(i);
            found = min(found, __shfl_xor_sync(kWholeWarp, found, 1));
            found = min(found, __shfl_xor_sync(kWholeWarp, found, 2));
            if (largest > best[r]) best[r] = largest, index[r] = found;
        }
    }

    // The column, among 32 of the tile, whose largest product reduce_columns leaves in this lane.
    __device__ static int reduced_column(int lane) {
        return ((lane >> 3) & 3) * 8 + (lane % 4) * 2 + ((lane >> 2) & 1);
    }

    // The upper halves, which order by cosine, of the keys of the columns that reduced_column gives. All loads are
    // issued before the first result is used; the comparison of the rows hides their latency.
    __device__ static void load_stored(const Params& p, int begin, int lane, uint32_t (&stored)[N / 4]) {
        FM_UNROLL
        for (int n = 0; n < N / 4; ++n) {
            int own = begin + n * 32 + reduced_column(lane);
            const unsigned long long* key = p.best + p.column_begin + own;
            stored[n] = own < p.product.columns ? __ldcg(reinterpret_cast<const uint32_t*>(key) + 1) : 0xffffffffu;
        }
    }

    // Updates 32 columns at a time. A stored key may be stale, but keys only grow: a product below it cannot be the
    // largest.
    __device__ void update_columns(const Params& p, const Accumulators<M, N>& products, const uint32_t (&stored)[N / 4],
                                   int row, int column, int lane) {
        int quad = lane % 4;
        FM_UNROLL
        for (int n = 0; n < N; n += 4) {
            float value[8];
            FM_UNROLL
            for (int i = 0; i < 8; ++i) {
                float largest = kMasked<float>;
                FM_UNROLL
                for (int r = 0; r < kRows; ++r) largest = fmaxf(largest, products[r >> 1][element_of(r, 2 * n + i)]);
                value[i] = largest;
            }
            float largest = reduce_columns(value, lane); // of the column that this lane now owns
            bool better = largest > kMasked<float> && ordered(largest) >= stored[n / 4];
            unsigned improved = __ballot_sync(kWholeWarp, better);
            if (!improved) continue;
            FM_UNROLL
            for (int i = 0; i < 8; ++i) {
                int owner = ((i >> 1) << 3) + ((i & 1) << 2); // of column i in lane quad 0
                if (!(improved >> owner & 15)) continue;
                float wanted = __shfl_sync(kWholeWarp, largest, owner + quad);
                bool wants = improved >> (owner + quad) & 1;
                int j = column + column_offset(2 * n + i);
                FM_UNROLL
                for (int r = 0; r < kRows; ++r) {
                    float mine = products[r >> 1][element_of(r, 2 * n + i)];
                    if (wants && mine == wanted)
                        atomicMax(p.best + p.column_begin + j,
                                  nearest_key(mine, p.row_begin + row + row_offset<Stride>(r)));
                }
            }
        }
    }

    // The largest product of each column over the 8 lanes that share quad. Each step halves the columns of a lane, so
    // that column (lane >> 3 & 3) * 2 + (lane >> 2 & 1) remains.
    __device__ static float reduce_columns(const float (&value)[8], int lane) {
        float four[4], two[2];
        FM_UNROLL
        for (int i = 0; i < 4; ++i) four[i] = fold(value[i], value[i + 4], lane & 16, 16);
        FM_UNROLL
        for (int i = 0; i < 2; ++i) two[i] = fold(four[i], four[i + 2], lane & 8, 8);
        return fold(two[0], two[1], lane & 4, 4);
    }
    __device__ static float fold(float lower, float upper, bool keep_upper, int mask) {
        float own = keep_upper ? upper : lower, sent = keep_upper ? lower : upper;
        return fmaxf(own, __shfl_xor_sync(kWholeWarp, sent, mask));
    }
};

} // namespace fm::cuda
