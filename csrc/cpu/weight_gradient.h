// The gradient of one row of the class weights, for the CPU kernels. Compiled once per instruction set.
#pragma once

#include "rows.h"

namespace fm::cpu::FM_ISA {
namespace {

// g := inverse (g - (g . u) u), where u = direction * unit
template <class T> inline void project_out(T* g, const T* direction, T unit, T inverse, int64_t size) {
    T along = static_cast<T>(dot(g, direction, size) * static_cast<double>(unit));
#pragma omp simd
    for (int64_t d = 0; d < size; ++d) g[d] = inverse * (g[d] - along * (unit * direction[d]));
}

// Completes row `row` of the chunk, see ProjectWeightGradient. own and other have room for one row each.
template <class T> inline void complete_gradient(const ProjectWeightGradient<T>& p, int64_t row, T* own, T* other) {
    int64_t j = p.class_begin + row;
    T* g = p.gradient + row * p.size;
    T inverse = p.inverse_norm ? p.inverse_norm[j] : static_cast<T>(1);
    if (p.dense_scale) {
        T scale = static_cast<T>(*p.dense_scale) * inverse;
        for (int64_t d = 0; d < p.size; ++d) g[d] *= scale;
    }
    if (p.sorted_labels)
        for (int64_t k = lower_bound(p.sorted_labels, p.samples, j); k < p.samples && p.sorted_labels[k] == j; ++k) {
            int64_t i = p.label_order[k];
            add_scaled(g, inverse * static_cast<T>(p.target_gradient[i]), p.normalized_embeddings + i * p.size, p.size);
        }
    if (p.uniform_direction)
        add_scaled(g, inverse * static_cast<T>(p.class_weight ? p.class_weight[j] : 1.0), p.uniform_direction, p.size);
    if (p.nearest) {
        int64_t near = p.nearest[j];
        add_scaled(g, inverse * p.nearest_gradient[j], p.inverse_norm[near], load_row<T>(p.weight, near, p.size, other),
                   p.size);
        for (int64_t k = lower_bound(p.sorted_nearest, p.classes, j); k < p.classes && p.sorted_nearest[k] == j; ++k) {
            int64_t i = p.nearest_order[k];
            add_scaled(g, inverse * p.nearest_gradient[i], p.inverse_norm[i], load_row<T>(p.weight, i, p.size, other),
                       p.size);
        }
    }
    if (p.length_gradient && p.length_gradient[j] != 0.0) {
        const T* w = load_row<T>(p.weight, j, p.size, own);
        double length = sqrt(dot(w, w, p.size));
        if (length > 0.0) add_scaled(g, static_cast<T>(p.length_gradient[j] / length), w, p.size);
    }
    if (!p.inner_product) project_out(g, load_row<T>(p.weight, j, p.size, own), inverse, static_cast<T>(1), p.size);
}

} // namespace
} // namespace fm::cpu::FM_ISA
