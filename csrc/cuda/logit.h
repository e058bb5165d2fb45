// a cos - k, from the accumulator of a product of two operands.
#pragma once

#include "../kernels/tensor.h"
#include "../math/exponential.h"

namespace fm::cuda {

struct Logit {
    float high, low;

    FM_HD static Logit of(double scale) {
        double a = scale * kLog2E / (static_cast<double>(kOperandScale) * kOperandScale);
        if (a < 1e-35) a = 1e-35; // with a scale of 0 the exponential of kMasked is still 0
        float high = static_cast<float>(a);
        return {high, static_cast<float>(a - static_cast<double>(high))};
    }
    // The larger product is not rounded before k is subtracted.
    FM_HD float operator()(float product, float k) const {
        return multiply_add(product, low, multiply_add(product, high, -k));
    }
};

} // namespace fm::cuda
