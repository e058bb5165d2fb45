// psi(theta) = cos(m1 theta + m2) - m3 and its derivatives, in double, for one sample.
#pragma once

#include "../kernels/loss.h"
#include "platform.h"

namespace fm {

struct Margin {
    double value, d_cosine, d_m1, d_m2, d_m3, d_annealing;
};

// sin(phi) / sin(theta), with its limit as theta approaches 0 or pi. If there is no limit (m2 > 0 at theta = 0),
// sin(theta) is held at `floor`: the direction that the ratio scales has no more accuracy than that.
FM_HD double sine_ratio(double theta, double phi, double m1, double m2, double floor) {
    double sine = sin(theta);
    if (sine >= floor) return sin(phi) / sine;
    bool low = theta < 1.0;
    double edge = low ? m2 : m1 * kPi + m2; // phi at the nearer end
    double sine_edge = sin(edge);
    if (fabs(sine_edge) < 1e-9) sine_edge = 0.0; // a multiple of pi, up to rounding
    return sine_edge / floor + (low ? m1 : -m1) * cos(edge);
}

// annealing is SphereFace's lambda: the result is (lambda cos + psi) / (1 + lambda).
FM_HD Margin apply_margin(double cosine, double m1, double m2, double m3, double annealing, BeyondPi beyond_pi,
                          bool easy, bool straight_through, double smallest_sine) {
    double c = cosine > 1.0 ? 1.0 : (cosine < -1.0 ? -1.0 : cosine); // keeps NaN
    Margin m{c, 1.0, 0.0, 0.0, 0.0, 0.0};
    if (!easy || c > 0.0) {
        double theta = acos(c), phi = m1 * theta + m2;
        if (beyond_pi == BeyondPi::linear && phi > kPi) {
            m.value = c - m2 * sin(m2);
            m.d_m2 = -sin(m2) - m2 * cos(m2);
        } else {
            double k = beyond_pi == BeyondPi::monotone ? floor(phi / kPi) : 0.0;
            double sign = fmod(k, 2.0) == 0.0 ? 1.0 : -1.0;
            m.value = sign * cos(phi) - 2.0 * k - m3;
            double ratio = sine_ratio(theta, phi, m1, m2, smallest_sine);
            m.d_cosine = m1 * (beyond_pi == BeyondPi::monotone ? fabs(ratio) : ratio); // sign sin(phi) >= 0
            m.d_m2 = -sign * sin(phi);
            m.d_m1 = theta * m.d_m2;
            m.d_m3 = -1.0;
        }
    }
    if (straight_through) m.d_cosine = 1.0;
    double share = 1.0 / (1.0 + annealing);
    m.d_annealing = (c - m.value) * share * share;
    m.value = (annealing * c + m.value) * share;
    m.d_cosine = (annealing + m.d_cosine) * share;
    m.d_m1 *= share;
    m.d_m2 *= share;
    m.d_m3 *= share;
    return m;
}

} // namespace fm
