// Positions in a tile of scores, candidate lists and nearest rows: the parts that one thread executes on either device.
#pragma once

#include "../kernels/search.h"
#include "platform.h"

#include <limits>

namespace fm {

FM_HD int64_t row_place(const ScoreTile& t, int64_t r) { return t.row_place ? t.row_place[r] : t.row_begin + r; }
FM_HD int64_t row_number(const ScoreTile& t, int64_t r) { return t.row_number ? t.row_number[r] : row_place(t, r); }
FM_HD int64_t column_number(const ScoreTile& t, int64_t j) { return t.column_first + t.column_begin + j; }

// The upper bound of a full list after one more product: the smaller of it and the last of the list is left out.
FM_HD float raised_bound(float upper_bound, float value, float last) {
    float excluded = value < last ? value : last;
    return excluded > upper_bound ? excluded : upper_bound;
}

// The upper bound of a refreshed row, whose list is about to be emptied: see RemoveRefreshed.
FM_HD float lowered_bound(float upper_bound, int32_t first_candidate, float first_value) {
    return first_candidate >= 0 && first_value > upper_bound ? upper_bound - 0.25f * (first_value - upper_bound)
                                                             : -std::numeric_limits<float>::infinity();
}

// Whether (cosine, index) precedes the entry at a place of the nearest rows.
FM_HD bool precedes(double cosine, int64_t index, double other_cosine, int64_t other_index) {
    return cosine > other_cosine || (cosine == other_cosine && index < other_index);
}

// Inserts (cosine, index) into the k nearest of a query if it belongs there. NaN never does, nor does an index twice.
FM_HD void insert_nearest(const Nearest& nearest, int64_t query, double cosine, int64_t index) {
    double* cosines = nearest.cosine + query * nearest.count;
    int64_t* indices = nearest.index + query * nearest.count;
    int64_t at = nearest.count - 1;
    if (indices[at] >= 0 ? !precedes(cosine, index, cosines[at], indices[at])
                         : !(cosine > -std::numeric_limits<double>::infinity()))
        return;
    for (int64_t k = 0; k < nearest.count; ++k)
        if (indices[k] == index) return;
    for (; at > 0 && (indices[at - 1] < 0 || precedes(cosine, index, cosines[at - 1], indices[at - 1])); --at) {
        cosines[at] = cosines[at - 1];
        indices[at] = indices[at - 1];
    }
    cosines[at] = cosine;
    indices[at] = index;
}

// The smallest of the k cosines of a query.
FM_HD const double& smallest_cosine(const Nearest& nearest, int64_t query) {
    return nearest.cosine[(query + 1) * nearest.count - 1];
}

// Whether a query has the same cosine with every reference: NaN, or 0 for a zero row.
FM_HD bool has_constant_cosine(const QuantizedRows& query, int64_t i) {
    return query.error[i] < 0.0f || query.inverse_norm[i] == 0.0;
}

// The nearest of such a query are the first references; those with NaN only for a query with NaN.
FM_HD void fill_constant_nearest(const RerankCandidates& p, int64_t i) {
    const int64_t k = p.nearest.count, self = p.one_set ? p.query_first + i : -1;
    const bool nan = p.query.error[i] < 0.0f;
    int64_t found = 0;
    for (int64_t j = 0; j < p.references && found < k; ++j) {
        int64_t number = p.reference_first + j;
        if (number == self || (!nan && p.reference.error[j] < 0.0f)) continue;
        insert_nearest(p.nearest, i, 0.0, number);
        ++found;
    }
    for (int64_t c = 0; nan && c < k; ++c) p.nearest.cosine[i * k + c] = std::numeric_limits<double>::quiet_NaN();
}

// The place of a candidate among the references, or -1 if it is not one of them.
FM_HD int64_t candidate_place(const RerankCandidates& p, int32_t candidate) {
    int64_t place = candidate - p.reference_first;
    return place < p.references ? place : -1;
}

} // namespace fm
