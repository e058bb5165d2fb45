// The optimizer step of the rows of a class weight in portable CUDA, one warp per row.
#include "cuda.h"
#include "weight_gradient.h"

#include "../math/random.h"
#include "../math/update.h"

#include <stdexcept>

namespace fm::cuda {
namespace {

// The parameters of a launch. The numbers of the rule are computed once, on the host.
template <class T, class Rule> struct Steps {
    StepRows<T> rows;
    Rule rule;
};

// Random words of the elements of a piece. They stay in registers between the store of the moments and that of the row.
template <class Piece> struct RandomWords {
    static constexpr int G = Piece::kGroup;
    uint32_t word[Piece::kGroups][G];

    template <class T> __device__ void draw(const StepRows<T>& p, int64_t r, int64_t begin) {
        static_assert(4 % G == 0 && Piece::kSize % 4 == 0);
        constexpr int step = Piece::kAccess == Access::strided ? 1 : G; // elements that one call serves
        FM_UNROLL
        for (int k = 0; k < Piece::kGroups; ++k) {
            FM_UNROLL
            for (int e = 0; e < G; e += step) {
                const int offset = Piece::offset(k, e);
                uint32_t words[4];
                random_words(static_cast<uint64_t>(p.seed), static_cast<uint64_t>(p.step),
                             static_cast<uint64_t>(p.first_row + r), static_cast<uint32_t>((begin + offset) / 4),
                             words);
                FM_UNROLL
                for (int i = 0; i < step; ++i) {
                    const int at = step == 4 ? i : offset % 4 + i; // selected without an array in local memory
                    word[k][e + i] = at & 2 ? (at & 1 ? words[3] : words[2]) : (at & 1 ? words[1] : words[0]);
                }
            }
        }
    }
};

// Rounds T to the element type S of the rows. random has 16 bits, which only stochastic rounding uses.
template <class S> struct RoundTo {
    bool stochastic;
    template <class T> __device__ S operator()(T value, uint32_t random) const {
        if constexpr (sizeof(S) == sizeof(BFloat16)) {
            const float rounded = static_cast<float>(value);
            return {stochastic ? to_bfloat16(rounded, random) : to_bfloat16(rounded)};
        } else {
            return static_cast<S>(value);
        }
    }
};

// S is the element type of the rows, and of completion.weight.
template <class Piece, class S, class Rule> __global__ void step_rows(Steps<typename Piece::Value, Rule> steps) {
    using T = typename Piece::Value;
    const StepRows<T>& p = steps.rows;
    const ProjectWeightGradient<T>& c = p.completion;
    const int64_t i = warp_row(), size = c.size;
    if (i >= c.chunk || (p.skip && *p.skip)) return;
    const int64_t j = c.class_begin + i, r = p.selected ? p.selected[i] : j;
    T* const gradient = c.gradient + i * size;
    S* const w = static_cast<S*>(p.parameter.data) + r * size;
    S* const m = p.momentum.data ? static_cast<S*>(p.momentum.data) + r * size : nullptr;
    S* const v = Rule::kSecondMoment ? static_cast<S*>(p.second_moment.data) + r * size : nullptr;
    // The Jacobian reads the same row that is stepped, unless the classes are drawn.
    const bool has_row = !c.inner_product && static_cast<const S*>(c.weight.data) + j * c.weight.row_stride == w &&
                         c.weight.column_stride == 1;
    const int64_t last = Piece::last(size);
    const RoundTo<S> round{p.stochastic};
    constexpr bool is_half = sizeof(S) == sizeof(BFloat16);

    Piece row, first, second;
    RandomWords<Piece> random;
    auto draw = [&](int64_t begin) {
        if constexpr (is_half)
            if (p.stochastic) random.draw(p, r, begin);
    };
    auto word = [&](int k, int e) {
        if constexpr (is_half) return random.word[k][e];
        return 0u;
    };
    auto load_moments = [&](int64_t begin) {
        if (m) first.load(Row<S>(m), begin, size);
        if constexpr (Rule::kSecondMoment) second.load(Row<S>(v), begin, size);
    };
    first.for_each([](T& value) { value = 0; });
    load_moments(last); // before the reductions, which wait for other loads

    double squares = 0.0;
    complete_weight_gradient<Piece, S>(c, i, [&](Piece& g, Piece& u, int64_t begin) {
        if (p.added) g.add(static_cast<T>(1), Row<T>(p.added + j * size), begin, size);
        if (begin < last) load_moments(begin);
        draw(begin);
        auto round_first = [&](T value, int k, int e) { return round(value, word(k, e) >> 16); };
        if (p.momentum_only) {
            const T beta = static_cast<T>(p.update.beta1);
            first.for_each(g, [&](T& value, T added) { value = beta * value + added; });
            first.store(m, begin, size, round_first);
            return;
        }
        if (!has_row) u.load(Row<S>(w), begin, size);
        FM_UNROLL
        for (int k = 0; k < Piece::kGroups; ++k) {
            FM_UNROLL
            for (int e = 0; e < Piece::kGroup; ++e)
                row.value[k][e] = steps.rule(g.value[k][e], u.value[k][e], first.value[k][e], second.value[k][e]);
        }
        if (m) first.store(m, begin, size, round_first);
        if constexpr (Rule::kSecondMoment)
            second.store(v, begin, size,
                         [&](T value, int k, int e) { return round(value, second_random(word(k, e))); });
        if (p.project) squares += row.dot(row);
        if (begin > 0) row.store(gradient, begin, size); // until the norm is known
    });
    if (p.momentum_only) return;
    const T inverse = p.project ? static_cast<T>(projection_factor(warp_sum(squares))) : static_cast<T>(1);
    for (int64_t begin = 0; begin <= last; begin += Piece::kSize) { // the first piece is still in registers
        if (begin > 0) {
            row.load(Row<T>(gradient), begin, size);
            draw(begin);
        }
        row.store(w, begin, size, [&](T value, int k, int e) { return round(value * inverse, word(k, e) & 0xffffu); });
    }
}

template <template <class> class Rule, class T> void start_rule(const StepRows<T>& p, void* stream) {
    const Steps<T, Rule<T>> steps{p, Rule<T>::of(p.update)};
    const int64_t size = p.completion.size;
    constexpr int group = 16 / sizeof(T);
    const bool vectors = has_vectors(p.completion) && has_vectors(p.added, size) &&
                         has_vectors<group>(p.parameter, size) && has_vectors<group>(p.momentum, size) &&
                         has_vectors<group>(p.second_moment, size);
    auto start = [&](auto s) {
        // Short pieces for rows of any size: a thread holds up to four of them. The moments of longer rows are still
        // read and written once.
        using S = decltype(s);
        auto kernel = vectors ? step_rows<Piece<T, group, 4, Access::vectors>, S, Rule<T>>
                              : step_rows<Piece<T, group, 4, Access::strided>, S, Rule<T>>;
        launch_warp_rows(kernel, p.completion.chunk, stream, steps);
    };
    switch (p.parameter.dtype) {
    case Dtype::float32: return start(float{});
    case Dtype::float64: return start(double{});
    default: return start(BFloat16{});
    }
}

template <class T> void start(const StepRows<T>& p, void* stream) {
    if (p.completion.weight.dtype != p.parameter.dtype)
        throw std::runtime_error("fused_margin: step_rows needs parameter in the dtype of weight");
    if (p.update.rule == UpdateRule::adam || p.update.rule == UpdateRule::adamw)
        start_rule<AdamUpdate>(p, stream);
    else
        start_rule<MomentumUpdate>(p, stream);
}

} // namespace

void run(const StepRows<float>& p, void* stream) { start(p, stream); }
void run(const StepRows<double>& p, void* stream) { start(p, stream); }

} // namespace fm::cuda
