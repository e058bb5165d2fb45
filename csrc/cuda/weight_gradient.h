// The gradient of one row, completed by the warp of the row: of the class weights, and of the embeddings.
#pragma once

#include "row.h"

#include "../kernels/loss.h"

namespace fm::cuda {

// One row g of a gradient: prepare(piece of g, begin) changes each piece in place, then g := inverse (g - (g . u) u),
// where u = direction * unit. With `project` false g is only prepared. finish(piece of g, piece of direction, begin)
// gets each piece of the result, the last one first. Without `project` the piece of the direction has no value.
template <class Piece, class T, class S, class Prepare, class Finish>
__device__ void project_row(T* gradient, const Row<S>& direction, int64_t size, bool project, T unit, T inverse,
                            Prepare prepare, Finish finish) {
    const int64_t last = Piece::last(size);
    Piece g, u;
    double dot = 0.0;
    auto load = [&](int64_t begin) {
        g.load(Row<T>(gradient), begin, size);
        if (project) u.load(direction, begin, size);
    };
    for (int64_t begin = 0; begin <= last; begin += Piece::kSize) {
        load(begin);
        prepare(g, begin);
        if (project) dot += g.dot(u);
        if (begin < last) g.store(gradient, begin, size);
    }
    T along = static_cast<T>(0);
    if (project) along = static_cast<T>(warp_sum(dot) * static_cast<double>(unit));
    for (int64_t begin = last; begin >= 0; begin -= Piece::kSize) { // the last piece is still in registers
        if (begin < last) load(begin);
        if (project) g.for_each(u, [&](T& value, T other) { value = inverse * (value - along * (unit * other)); });
        finish(g, u, begin);
    }
}

// Adds the terms of ProjectWeightGradient to the dense part of the gradient of row j, before the Jacobian.
template <class Piece, class S> class PrepareWeightGradient {
    using T = typename Piece::Value;

public:
    __device__ PrepareWeightGradient(const ProjectWeightGradient<T>& p, int64_t j) : p_(p), j_(j) {
        inverse = p.inverse_norm ? p.inverse_norm[j] : static_cast<T>(1);
        scale_ = p.dense_scale ? static_cast<T>(*p.dense_scale) * inverse : static_cast<T>(1);
        if (!p.length_gradient || p.length_gradient[j] == 0.0) return;
        double squares = 0.0;
        for (int64_t begin = 0; begin < p.size; begin += Piece::kSize) {
            Piece w;
            w.load(Row<S>(p.weight, j), begin, p.size);
            squares += w.dot(w);
        }
        double length = sqrt(warp_sum(squares));
        if (length > 0.0) along_row_ = static_cast<T>(p.length_gradient[j] / length);
    }

    __device__ void operator()(Piece& g, int64_t begin) const {
        const auto& p = p_;
        g.for_each([&](T& value) { value *= scale_; });
        if (p.sorted_labels) {
            for (int64_t k = warp_lower_bound(p.sorted_labels, p.samples, j_);
                 k < p.samples && p.sorted_labels[k] == j_; ++k) {
                int64_t i = p.label_order[k];
                g.add(inverse * static_cast<T>(p.target_gradient[i]), Row<T>(p.normalized_embeddings + i * p.size),
                      begin, p.size);
            }
        }
        if (p.uniform_direction)
            g.add(inverse * static_cast<T>(p.class_weight ? p.class_weight[j_] : 1.0), Row<T>(p.uniform_direction),
                  begin, p.size);
        if (p.nearest) {
            int64_t near = p.nearest[j_];
            g.add(inverse * p.nearest_gradient[j_], p.inverse_norm[near], Row<S>(p.weight, near), begin, p.size);
            for (int64_t k = warp_lower_bound(p.sorted_nearest, p.classes, j_);
                 k < p.classes && p.sorted_nearest[k] == j_; ++k) {
                int64_t i = p.nearest_order[k];
                g.add(inverse * p.nearest_gradient[i], p.inverse_norm[i], Row<S>(p.weight, i), begin, p.size);
            }
        }
        if (along_row_ != static_cast<T>(0)) g.add(along_row_, Row<S>(p.weight, j_), begin, p.size);
    }

    T inverse;

private:
    const ProjectWeightGradient<T>& p_;
    int64_t j_;
    T scale_, along_row_ = static_cast<T>(0);
};

// Completes the gradient of row `row` of the chunk. S is the element type of weight. finish is that of project_row.
template <class Piece, class S, class Finish> __device__ void
complete_weight_gradient(const ProjectWeightGradient<typename Piece::Value>& p, int64_t row, Finish finish) {
    using T = typename Piece::Value;
    int64_t j = p.class_begin + row;
    const PrepareWeightGradient<Piece, S> prepare(p, j);
    project_row<Piece>(p.gradient + row * p.size, Row<S>(p.weight, j), p.size, !p.inner_product, prepare.inverse,
                       static_cast<T>(1), prepare, finish);
}

// Whether Access::vectors can read and write everything that PrepareWeightGradient uses.
template <class T> bool has_vectors(const ProjectWeightGradient<T>& p) {
    bool vectors = has_vectors<16 / sizeof(T)>(p.weight, p.size);
    for (const T* rows : {static_cast<const T*>(p.gradient), p.normalized_embeddings, p.uniform_direction})
        vectors = vectors && has_vectors(rows, p.size);
    return vectors;
}

} // namespace fm::cuda
