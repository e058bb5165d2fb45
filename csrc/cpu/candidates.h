// The candidate lists of a search: insertion in order, or appending and halving. Compiled once per instruction set.
#pragma once

#include "cpu.h"

#include "../math/nearest.h"

#include <cstring>
#include <limits>

namespace fm::cpu::FM_ISA {
namespace {

inline int64_t count_above(const float* values, int64_t count, float threshold) {
    int64_t above = 0;
#pragma omp simd reduction(+ : above)
    for (int64_t c = 0; c < count; ++c) above += values[c] > threshold ? 1 : 0;
    return above;
}

// A threshold below `least` to `most` of the values. If equal values allow none, the value of which more than enough
// are equal: fewer than `least` are above it, and at least `least` are not below it.
inline float find_threshold(const float* values, int64_t count, int64_t least, int64_t most) {
    float low = values[0], high = values[0]; // more than `most` values are above low, and fewer than `least` above high
#pragma omp simd reduction(min : low) reduction(max : high)
    for (int64_t c = 0; c < count; ++c) {
        low = values[c] < low ? values[c] : low;
        high = values[c] > high ? values[c] : high;
    }
    int64_t above = count_above(values, count, low);
    if (above <= most) return low;
    for (;;) {
        float middle = low + (high - low) * 0.5f;
        if (!(middle > low && middle < high)) return high;
        above = count_above(values, count, middle);
        if (above > most)
            low = middle;
        else if (above < least)
            high = middle;
        else
            return middle;
    }
}

// Removes the smaller half of a full list, or a little less, and raises its upper bound.
inline void halve(const CandidateLists& lists, int64_t index) {
    int32_t* candidate = lists.candidate + index * lists.capacity;
    float* value = lists.value + index * lists.capacity;
    const int64_t least = lists.capacity / 2; // at least this many stay
    const float threshold = find_threshold(value, lists.capacity, least, least + lists.capacity / 4);
    int64_t equals = least - count_above(value, lists.capacity, threshold); // that stay; none if it is not positive
    int64_t kept = 0;
    for (int64_t c = 0; c < lists.capacity; ++c) {
        const float own = value[c];
        const bool stays = own > threshold || (own == threshold && equals-- > 0);
        value[kept] = own, candidate[kept] = candidate[c];
        kept += stays ? 1 : 0;
    }
    lists.count[index] = static_cast<int32_t>(kept);
    lists.upper_bound[index] = threshold;
}

// Inserts a product above the upper bound into a list: behind its equals, or at the end if the list has no order.
inline void insert_candidate(const CandidateLists& lists, int64_t index, int64_t id, float value) {
    int32_t* candidate = lists.candidate + index * lists.capacity;
    float* values = lists.value + index * lists.capacity;
    if (lists.count) {
        if (lists.count[index] == lists.capacity) {
            halve(lists, index);
            if (!(value > lists.upper_bound[index])) return;
        }
        const int64_t at = lists.count[index]++;
        values[at] = value, candidate[at] = static_cast<int32_t>(id);
        return;
    }
    const int64_t last = lists.capacity - 1;
    if (candidate[last] >= 0) { // full
        lists.upper_bound[index] = raised_bound(lists.upper_bound[index], value, values[last]);
        if (!(value > values[last])) return;
    }
    int64_t before = 0;
#pragma omp simd reduction(+ : before)
    for (int64_t c = 0; c < last; ++c) before += values[c] >= value ? 1 : 0;
    memmove(values + before + 1, values + before, static_cast<size_t>(last - before) * sizeof(float));
    memmove(candidate + before + 1, candidate + before, static_cast<size_t>(last - before) * sizeof(int32_t));
    values[before] = value;
    candidate[before] = static_cast<int32_t>(id);
}

// Calls visit(candidate, value) for the entries of a list. Without an order, the k largest and a few others come first.
template <class Visit>
inline void for_each_candidate(const CandidateLists& lists, int64_t index, int64_t k, Visit visit) {
    const int32_t* candidate = lists.candidate + index * lists.capacity;
    const float* value = lists.value + index * lists.capacity;
    if (!lists.count) {
        for (int64_t c = 0; c < lists.capacity && candidate[c] >= 0; ++c) visit(candidate[c], value[c]);
        return;
    }
    const int64_t count = lists.count[index];
    const float threshold =
        count > k ? find_threshold(value, count, k, 2 * k) : -std::numeric_limits<float>::infinity();
    for (int64_t c = 0; c < count; ++c)
        if (value[c] > threshold) visit(candidate[c], value[c]);
    for (int64_t c = 0; c < count; ++c)
        if (!(value[c] > threshold)) visit(candidate[c], value[c]);
}

} // namespace
} // namespace fm::cpu::FM_ISA
