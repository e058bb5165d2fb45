// The optimizer step of the rows of a class weight on the CPU. Compiled once per instruction set, like loss.cpp.
#include "weight_gradient.h"

#include "../math/random.h"
#include "../math/update.h"

namespace fm::cpu::FM_ISA {
namespace {

struct BFloat16 {
    uint16_t bits;
};

inline float value_of(float x) { return x; }
inline double value_of(double x) { return x; }
inline float value_of(BFloat16 x) { return from_bfloat16(x.bits); }

// Stores T in the type of the rows. random has 16 bits, which only a stochastic store uses.
struct Nearest {
    template <class T> void operator()(float& to, T value, uint32_t) const { to = static_cast<float>(value); }
    template <class T> void operator()(double& to, T value, uint32_t) const { to = static_cast<double>(value); }
    template <class T> void operator()(BFloat16& to, T value, uint32_t) const {
        to.bits = to_bfloat16(static_cast<float>(value));
    }
};
struct Stochastic : Nearest {
    using Nearest::operator();
    template <class T> void operator()(BFloat16& to, T value, uint32_t random) const {
        to.bits = to_bfloat16(static_cast<float>(value), random);
    }
};

// The rows of one launch: S is their type, T that of the arithmetic.
template <class T, class S, class Rule, class Store> class Rows {
public:
    explicit Rows(const StepRows<T>& p)
        : p_(p), rule_(Rule::of(p.update)), weight_(static_cast<S*>(p.parameter.data)),
          momentum_(static_cast<S*>(p.momentum.data)), second_(static_cast<S*>(p.second_moment.data)) {}

    void run() const {
        const auto& c = p_.completion;
#pragma omp parallel num_threads(threads_for(c.chunk* c.size))
        {
            Scratch<T> own(c.size), other(c.size);
            Scratch<uint32_t> random(c.size + 3);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < c.chunk; ++i) {
                T* g = c.gradient + i * c.size;
                complete_gradient<T>(c, i, own, other);
                if (p_.added) add_scaled(g, static_cast<T>(1), p_.added + (c.class_begin + i) * c.size, c.size);
                const int64_t r = p_.selected ? p_.selected[i] : c.class_begin + i;
                if (p_.stochastic) fill_random(r, random);
                step(g, r, random);
            }
        }
    }

private:
    void fill_random(int64_t r, uint32_t* random) const {
        const auto seed = static_cast<uint64_t>(p_.seed), step = static_cast<uint64_t>(p_.step);
        const auto row = static_cast<uint64_t>(p_.first_row + r);
        const int64_t groups = (p_.completion.size + 3) / 4;
#pragma omp simd
        for (int64_t group = 0; group < groups; ++group) {
            uint32_t words[4];
            random_words(seed, step, row, static_cast<uint32_t>(group), words);
            for (int k = 0; k < 4; ++k) random[4 * group + k] = words[k];
        }
    }

    // Steps row r. The new row is in g until its norm is known.
    void step(T* g, int64_t r, const uint32_t* random) const {
        const int64_t size = p_.completion.size;
        const Store store;
        S* w = weight_ + r * size;
        S* m = momentum_ ? momentum_ + r * size : nullptr;
        if (p_.momentum_only) {
            const T beta = static_cast<T>(p_.update.beta1);
#pragma omp simd
            for (int64_t d = 0; d < size; ++d)
                store(m[d], beta * static_cast<T>(value_of(m[d])) + g[d], random[d] >> 16);
            return;
        }
        if constexpr (Rule::kSecondMoment) {
            S* v = second_ + r * size;
#pragma omp simd
            for (int64_t d = 0; d < size; ++d) {
                T first = static_cast<T>(value_of(m[d])), second = static_cast<T>(value_of(v[d]));
                g[d] = rule_(g[d], static_cast<T>(value_of(w[d])), first, second);
                store(m[d], first, random[d] >> 16);
                store(v[d], second, second_random(random[d]));
            }
        } else if (m) {
#pragma omp simd
            for (int64_t d = 0; d < size; ++d) {
                T first = static_cast<T>(value_of(m[d])), none = 0;
                g[d] = rule_(g[d], static_cast<T>(value_of(w[d])), first, none);
                store(m[d], first, random[d] >> 16);
            }
        } else {
#pragma omp simd
            for (int64_t d = 0; d < size; ++d) {
                T first = 0, none = 0;
                g[d] = rule_(g[d], static_cast<T>(value_of(w[d])), first, none);
            }
        }
        T inverse = 1;
        if (p_.project) inverse = static_cast<T>(projection_factor(dot(g, g, size)));
#pragma omp simd
        for (int64_t d = 0; d < size; ++d) store(w[d], g[d] * inverse, random[d] & 0xffffu);
    }

    const StepRows<T>& p_;
    const Rule rule_;
    S* weight_;
    S* momentum_;
    S* second_;
};

template <class T, class S, class Rule> void step_rows(const StepRows<T>& p) {
    if constexpr (sizeof(S) == sizeof(BFloat16))
        if (p.stochastic) return Rows<T, S, Rule, Stochastic>(p).run();
    Rows<T, S, Rule, Nearest>(p).run();
}

template <class T, class S> void step_rows(const StepRows<T>& p) {
    if (p.update.rule == UpdateRule::adam || p.update.rule == UpdateRule::adamw)
        step_rows<T, S, AdamUpdate<T>>(p);
    else
        step_rows<T, S, MomentumUpdate<T>>(p);
}

template <class T> void step_rows(const StepRows<T>& p) {
    if (p.skip && *p.skip) return;
    switch (p.parameter.dtype) {
    case Dtype::float32: return step_rows<T, float>(p);
    case Dtype::float64: return step_rows<T, double>(p);
    default: return step_rows<T, BFloat16>(p);
    }
}

} // namespace

void run(const StepRows<float>& p) { step_rows(p); }
void run(const StepRows<double>& p) { step_rows(p); }

} // namespace fm::cpu::FM_ISA
