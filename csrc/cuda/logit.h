// a cos - k, from the accumulator of a product of two operands.
#pragma once

#include "tensor.h"

#include "../math/platform.h"

namespace fm::cuda {

// Stands in an accumulator for what does not count: below every product, and so far below that its
// exponential is 0 whatever the scale.
constexpr float kNothing = -3e38f;

struct Logit {
    float high, low;

    FM_HD static Logit of(double scale) {
        double a = scale * 1.4426950408889634 / (static_cast<double>(kOperandScale) * kOperandScale);
        if (a < 1e-35) a = 1e-35; // a scale of 0 still leaves nothing of kNothing
        float high = static_cast<float>(a);
        return {high, static_cast<float>(a - static_cast<double>(high))};
    }
    // The larger product is not rounded before k is taken away.
    FM_HD float operator()(float product, float k) const {
        return multiply_add(product, low, multiply_add(product, high, -k));
    }
};

} // namespace fm::cuda
