// 2^(a c - k) for a cosine c: one branch-free polynomial for both devices, accurate to 1e-7.
#pragma once

#include "platform.h"

namespace fm {

// Per-row constants. a is split in two floats, because rounding a alone would cost |a c| / 2^25.
template <class T> struct Exponential;

template <> struct Exponential<float> {
    float high, low;
    int exponent;
    float smallest; // below this power of two the result is 0: no denormals

    FM_HD Exponential(double scale, double k) {
        double a = scale * 1.4426950408889634;
        high = static_cast<float>(a);
        low = static_cast<float>(a - static_cast<double>(high));
        exponent = static_cast<int>(k);
        smallest = static_cast<float>(k - 125.0);
    }

    FM_HD float operator()(float cosine) const {
        constexpr float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer in the low bits
        float shifted = cosine * high + magic;
        float n = shifted - magic;
        float f = (cosine * high - n) + cosine * low; // in [-0.5, 0.5]
        // minimax in relative error for 2^f, 1.9e-9
        float p = 1.53458119978e-4f;
        p = p * f + 1.33999312191e-3f;
        p = p * f + 9.61848895713e-3f;
        p = p * f + 5.55032877697e-2f;
        p = p * f + 2.40226468906e-1f;
        p = p * f + 6.93147205737e-1f;
        p = p * f + 1.0f;
        uint32_t power = (bits_of(shifted) - static_cast<uint32_t>(exponent)) << 23;
        return n < smallest ? 0.0f : float_of(bits_of(p) + power);
    }
};

template <> struct Exponential<double> {
    double a, k;
    FM_HD Exponential(double scale, double exponent) : a(scale * 1.4426950408889634), k(exponent) {}
    FM_HD double operator()(double cosine) const { return exp2(a * cosine - k); }
};

// The integer k that puts a row's largest logit at 2^0. A row without negatives has no logit: 0.
FM_HD double row_exponent(double scale, double largest_cosine) {
    return largest_cosine < -2.0 ? 0.0 : rint(scale * 1.4426950408889634 * largest_cosine);
}

} // namespace fm
