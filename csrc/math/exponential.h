// 2^(a c - k) for a cosine c. In float, one branch-free polynomial for both devices, accurate to 1e-7; in double, exp2.
#pragma once

#include "platform.h"

namespace fm {

// Marks a product that is excluded from its row's sum. No product of rows that have norms is that low, and its
// exponential is 0 for any scale.
template <class T> inline constexpr T kMasked = static_cast<T>(-3.0e38);

// The constants of one sample. In float, a is split into two floats, because rounding it to one would cost |a c| /
// 2^25.
template <class T> struct Exponential;

template <> struct Exponential<float> {
    float high, low, k;

    FM_HD static Exponential of(double scale, double k) {
        double a = scale * kLog2E;
        float high = static_cast<float>(a);
        return {high, static_cast<float>(a - static_cast<double>(high)), static_cast<float>(k)};
    }

    FM_HD float operator()(float cosine) const {
        constexpr float magic = 12582912.0f; // 1.5 * 2^23: adding it rounds to an integer
        float n = multiply_add(cosine, high, magic) - magic;
        float f = multiply_add(cosine, low, multiply_add(cosine, high, -n)); // in [-0.5, 0.5]
        // minimax in relative error for 2^f, 1.9e-9
        float p = 1.53458119978e-4f;
        p = multiply_add(p, f, 1.33999312191e-3f);
        p = multiply_add(p, f, 9.61848895713e-3f);
        p = multiply_add(p, f, 5.55032877697e-2f);
        p = multiply_add(p, f, 2.40226468906e-1f);
        p = multiply_add(p, f, 6.93147205737e-1f);
        p = multiply_add(p, f, 1.0f);
        float power = n - k;
        float value = float_of(bits_of(p) + (static_cast<uint32_t>(static_cast<int32_t>(power)) << 23));
        return power < -125.0f ? 0.0f : value; // no denormals
    }
};

template <> struct Exponential<double> {
    double high, low, k;
    FM_HD static Exponential of(double scale, double k) { return {scale * kLog2E, 0.0, k}; }
    FM_HD double operator()(double cosine) const { return exp2(high * cosine - k); }
};

// The integer nearest to the row's largest logit, in powers of two; 0 for a row without negatives.
FM_HD double row_exponent(double scale, double largest_cosine) {
    return largest_cosine <= static_cast<double>(kMasked<float>) ? 0.0 : rint(scale * kLog2E * largest_cosine);
}

// Exponential for rows whose logits are too large to be rounded to integers: k is then the largest logit itself, whose
// exponential is exactly 1. Correct as long as a is finite in T.
template <class T> struct WideExponential {
    static constexpr double kLeast = sizeof(T) == 4 ? 4194304.0 : 1125899906842624.0; // 2^22, 2^50

    T high, low, k, base; // base is subtracted from the cosine: the largest cosine, or 0

    FM_HD static bool needed(double scale, T largest) {
        return largest > kMasked<T> && fabs(scale * kLog2E * static_cast<double>(largest)) > kLeast;
    }
    // Sets `exponent` to k.
    FM_HD static WideExponential of(double scale, T largest, double& exponent) {
        double a = scale * kLog2E;
        T high = static_cast<T>(a), low = static_cast<T>(a - static_cast<double>(high));
        if (!needed(scale, largest)) {
            exponent = row_exponent(scale, static_cast<double>(largest));
            return {high, low, static_cast<T>(exponent), 0};
        }
        exponent = a * static_cast<double>(largest);
        return {high, low, 0, largest};
    }

    FM_HD T operator()(T cosine) const {
        T below = cosine - base;
        T power = multiply_add(below, high, -k) + below * low;           // NaN if below is -infinity and low is 0
        bool underflows = below < 0 && !(power >= static_cast<T>(-125)); // no denormals
        return underflows ? static_cast<T>(0) : static_cast<T>(exp2(power));
    }
};

// The transformed cosine of a negative, and its derivative: CurricularFace's hard negatives (arXiv:2004.00288, eq. 6).
template <class T> FM_HD T hard_negative(T cosine, T threshold, T strength, T& slope) {
    bool hard = cosine > threshold;
    slope = hard ? strength + 2 * cosine : static_cast<T>(1);
    return hard ? cosine * (strength + cosine) : cosine;
}

// The transformed cosine of InsightFace's interclass filtering: 0 above the threshold. NaN stays.
template <class T> FM_HD T filtered_negative(T cosine, T threshold, T& slope) {
    bool filtered = cosine > threshold;
    slope = static_cast<T>(filtered ? 0 : 1);
    return filtered ? static_cast<T>(0) : cosine;
}

} // namespace fm
