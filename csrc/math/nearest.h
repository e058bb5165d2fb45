// Positions in a tile of scores, candidate lists and nearest rows: the parts that one thread executes on either device.
#pragma once

#include "../kernels/search.h"
#include "platform.h"

#include <limits>

namespace fm {

FM_HD int64_t row_index(const ScoreTile& t, int64_t r) { return t.row_index ? t.row_index[r] : t.row_begin + r; }
FM_HD int64_t row_id(const ScoreTile& t, int64_t r) { return t.row_id ? t.row_id[r] : row_index(t, r); }
FM_HD int64_t column_id(const ScoreTile& t, int64_t j) { return t.column_first_id + t.column_begin + j; }

// The upper bound of a full list after one more product: of that product and the last one of the list, the smaller is
// left out.
FM_HD float raised_bound(float upper_bound, float value, float last) {
    float excluded = value < last ? value : last;
    return excluded > upper_bound ? excluded : upper_bound;
}

// The upper bound of a refreshed row, whose list is about to be emptied: see RemoveRefreshed.
FM_HD float lowered_bound(float upper_bound, int32_t first_candidate, float first_value) {
    return first_candidate >= 0 && first_value > upper_bound ? upper_bound - 0.25f * (first_value - upper_bound)
                                                             : -std::numeric_limits<float>::infinity();
}

// Whether (cosine, index) precedes another entry of the nearest rows.
FM_HD bool precedes(double cosine, int64_t index, double other_cosine, int64_t other_index) {
    return cosine > other_cosine || (cosine == other_cosine && index < other_index);
}

// Inserts (cosine, index) into the k nearest of a query if it belongs there. NaN and an index that is already there are
// not inserted.
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

// A query with a constant cosine has the first references as its nearest. References with NaN count only if the query
// has NaN.
FM_HD void fill_constant_nearest(const RerankCandidates& p, int64_t i) {
    const int64_t k = p.nearest.count, self = p.same_set ? p.query_first_id + i : -1;
    const bool nan = p.query.error[i] < 0.0f;
    int64_t found = 0;
    for (int64_t j = 0; j < p.references && found < k; ++j) {
        int64_t id = p.reference_first_id + j;
        if (id == self || (!nan && p.reference.error[j] < 0.0f)) continue;
        insert_nearest(p.nearest, i, 0.0, id);
        ++found;
    }
    for (int64_t c = 0; nan && c < k; ++c) p.nearest.cosine[i * k + c] = std::numeric_limits<double>::quiet_NaN();
}

// The row of a candidate among the references, or a negative number if it is not one of them.
FM_HD int64_t candidate_row(const RerankCandidates& p, int32_t candidate) {
    int64_t row = candidate - p.reference_first_id;
    return row < p.references ? row : -1;
}

} // namespace fm
