// The arithmetic of quantized rows: int8 codes, measured errors, and the bounds that follow from them.
#pragma once

#include "../kernels/search.h"
#include "norm.h"

#include <limits>

namespace fm {

FM_HD float round_up(double x) { return nextafterf(static_cast<float>(x), std::numeric_limits<float>::infinity()); }

// How one row becomes int8 codes.
template <class T> struct Int8Quantizer {
    T factor;    // from an element to its code; 0 if the row has no codes
    float scale; // from a code to the element of the unit row, or of the raw row for inner products

    // largest: the largest magnitude of the row's elements. It may miss a NaN; squares is NaN then.
    FM_HD static Int8Quantizer of(double largest, double squares, bool inner_product) {
        double inverse = inner_product ? 1.0 : inverse_norm_of(squares);
        double step = largest * inverse / 127.0;
        bool usable = step > 1e-30 && step < 1e30 && squares == squares; // not for zero, infinite and NaN rows
        return {usable ? static_cast<T>(inverse / step) : static_cast<T>(0), usable ? static_cast<float>(step) : 0.0f};
    }

    FM_HD bool usable() const { return scale != 0.0f; }
    FM_HD int8_t operator()(T element) const {
        T scaled = usable() ? element * factor : static_cast<T>(0);
        return static_cast<int8_t>(scaled < 0 ? scaled - static_cast<T>(0.5) : scaled + static_cast<T>(0.5));
    }
};

// Stores the measurements of row r. squares: |x|^2 of the raw row; rest: |x - q|^2; codes_squares: |q|^2. The factor
// and the constant exceed the rounding errors of the sums.
FM_HD void store_measurements(const MeasureQuantization& p, int64_t r, double inverse, double squares, double rest,
                              double codes_squares) {
    const double slack = 1.0 + 1e-12;
    p.inverse_norm[r] = inverse;
    if (p.norm) p.norm[r] = round_up(sqrt(squares) * slack);
    float length = round_up(sqrt(codes_squares) * slack);
    p.length[r] = length;
    double error = sqrt(rest) * slack + 1e-13 + p.rounding * static_cast<double>(length);
    p.error[r] = error == error ? round_up(error) : -1.0f;
}

// The inverse norm that cosines or inner products of a row use.
FM_HD double measured_inverse_norm(const MeasureQuantization& p, double squares) {
    return !p.inner_product ? inverse_norm_of(squares) : squares == 0.0 ? 0.0 : 1.0;
}

// The product of two quantized rows from the product of their codes.
template <class S> FM_HD float scaled_score(S score, float row_scale, float column_scale) {
    return static_cast<float>(score) * (row_scale * column_scale);
}

// The difference between a product of quantized rows and the product of the rows is at most this: (*) in search.h.
FM_HD double error_bound(const QuantizedRows& query, int64_t i, const QuantizedRows& reference, int64_t j) {
    double norm = reference.norm ? static_cast<double>(reference.norm[j]) : 1.0;
    return static_cast<double>(query.error[i]) * norm +
           static_cast<double>(query.length[i]) * static_cast<double>(reference.error[j]);
}

// Calls f with a zero of the scores' type.
template <class F> void dispatch_score_type(const Scores& scores, F f) {
    switch (scores.type) {
    case Scores::int32: return f(int32_t{});
    case Scores::float32: return f(float{});
    default: return f(double{});
    }
}

} // namespace fm
