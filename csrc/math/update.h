// The arithmetic of one element of an optimizer step.
#pragma once

#include "../kernels/step.h"
#include "platform.h"

namespace fm {

// The factor that gives a row unit length; a zero row stays zero, and a row of NaN or infinity becomes NaN.
FM_HD double projection_factor(double squares) {
    double norm = sqrt(squares);
    return norm == 0.0 ? 1.0 : 1.0 / norm + (norm - norm);
}

// The random bits that round the second moment. They are independent of those of the element and of the first moment.
FM_HD uint32_t second_random(uint32_t word) { return (word >> 16 ^ word * 0x9E3779B1u) & 0xffffu; }

// Each rule maps a gradient g and an element w to the new element, and updates the moments.
template <class T> struct MomentumUpdate {
    static constexpr bool kSecondMoment = false;
    T lr, momentum, weight_decay;
    bool nesterov;
    static FM_HD MomentumUpdate of(const Update& u) {
        return {static_cast<T>(u.lr), static_cast<T>(u.beta1), static_cast<T>(u.weight_decay),
                u.rule == UpdateRule::nesterov};
    }
    FM_HD T operator()(T g, T w, T& m, T&) const {
        g += weight_decay * w;
        m = momentum * m + g;
        return w - lr * (nesterov ? g + momentum * m : m);
    }
};

template <class T> struct AdamUpdate {
    static constexpr bool kSecondMoment = true;
    T step_size, new1, keep2, new2, eps, added_decay, kept, inverse_root;
    static FM_HD AdamUpdate of(const Update& u) {
        bool decoupled = u.rule == UpdateRule::adamw;
        return {static_cast<T>(u.lr / u.correction1),
                static_cast<T>(1.0 - u.beta1), // in double: 1 - 0.999f has a relative error of 1e-5
                static_cast<T>(u.beta2),
                static_cast<T>(1.0 - u.beta2),
                static_cast<T>(u.eps),
                static_cast<T>(decoupled ? 0.0 : u.weight_decay),
                static_cast<T>(decoupled ? 1.0 - u.lr * u.weight_decay : 1.0),
                static_cast<T>(1.0 / sqrt(u.correction2))};
    }
    FM_HD T operator()(T g, T w, T& m, T& v) const {
        g += added_decay * w;
        m += new1 * (g - m);
        v = keep2 * v + new2 * g * g;
        return kept * w - step_size * m / (sqrt(v) * inverse_root + eps);
    }
};

} // namespace fm
