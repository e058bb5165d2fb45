// The loss of one sample from its sums, and its derivatives in everything it depends on.
#pragma once

#include "element.h"
#include "margin.h"

namespace fm {

FM_HD void margin_row(const MarginRows& p, int64_t i) {
    double* derivative = p.derivatives + i;
    int64_t label = p.labels[i];
    bool ignored = label < 0 || label >= p.classes || label == p.ignore_index;
    double class_weight = ignored ? 0.0 : (p.class_weight ? p.class_weight[label] : 1.0);
    p.row_weight[i] = class_weight;
    if (ignored) {
        p.loss[i] = 0.0;
        for (int k = 0; k < kMarginDerivatives; ++k) derivative[k * p.samples] = 0.0;
        return;
    }
    double s = value_at(p.scale, i), cosine = p.target_cosine[i];
    Margin m = apply_margin(cosine, value_at(p.m1, i), value_at(p.m2, i), value_at(p.m3, i), value_at(p.annealing, i),
                            p.beyond_pi, p.easy, p.straight_through, p.smallest_sine);
    double z = s * m.value;
    double gap = p.negative_logsumexp[i] - z; // -inf if there is no other class
    double tail = exp(-fabs(gap));
    double nll = (gap > 0.0 ? gap : 0.0) + log1p(tail);     // log(1 + exp(gap))
    double other = (gap > 0.0 ? 1.0 : tail) / (1.0 + tail); // probability of all other classes
    // loss = nll_weight nll + smooth (lse sum_w - s (uniform - w_y cos) - w_y z), lse = z + nll
    double nll_weight = (1.0 - p.label_smoothing) * class_weight;
    double d_z = -nll_weight * other, d_nlse = nll_weight * other, d_cosine = 0.0, d_s = 0.0;
    double loss = nll_weight * nll;
    derivative[d_uniform_cosine * p.samples] = 0.0;
    if (p.uniform_cosine) {
        double sum_w = p.class_weight_sum ? *p.class_weight_sum : static_cast<double>(p.classes);
        double smooth = p.label_smoothing / static_cast<double>(p.classes);
        double rest = p.uniform_cosine[i] - class_weight * cosine;
        loss += smooth * ((z + nll) * sum_w - s * rest - class_weight * z);
        d_nlse += smooth * other * sum_w;
        d_z += smooth * ((1.0 - other) * sum_w - class_weight);
        d_cosine += smooth * s * class_weight;
        d_s -= smooth * rest;
        derivative[d_uniform_cosine * p.samples] = -smooth * s;
    }
    p.loss[i] = loss;
    derivative[d_negative_logsumexp * p.samples] = d_nlse;
    derivative[d_target_cosine * p.samples] = d_cosine + d_z * s * m.d_cosine;
    derivative[d_scale * p.samples] = d_s + d_z * m.value;
    derivative[d_m1 * p.samples] = d_z * s * m.d_m1;
    derivative[d_m2 * p.samples] = d_z * s * m.d_m2;
    derivative[d_m3 * p.samples] = d_z * s * m.d_m3;
    derivative[d_annealing * p.samples] = d_z * s * m.d_annealing;
}

} // namespace fm
