// The kernels of the losses: one params struct per kernel, implemented in cpu/loss.cpp and cuda/loss.cu.
//
// N samples, C classes, D embedding size. Arrays are contiguous unless they are a MatrixView. T (float or double) is
// the compute type of the N x C and C x D arithmetic. Per-sample values (logsumexp, target cosine, loss) are double:
// the cost is negligible, and the margin stays exact near cos = +-1.
#pragma once

#include "types.h"

namespace fm {

// The inverse L2 norm of every row and, if requested, the normalized rows. A row shorter than kSmallestNorm counts as a
// zero row: its inverse norm is 0, so its cosines and gradients are 0.
template <class T> struct RowNormalize {
    MatrixView rows;     // [R, D]
    T* normalized;       // [R, D] or null
    T* inverse_norm;     // [R]
    int64_t count, size; // R, D
};

// The cosine (or inner product) of every sample with its own class, accumulated in double from the unrounded inputs.
// With sub-centers a class has S rows of weight: the result is that of the best row, the first of equals. A label
// outside [0, C / S) gives cosine 0 and row -1 and, unless it is ignore_index, is reported through bad_label.
template <class T> struct TargetCosine {
    MatrixView embeddings; // [N, D]
    MatrixView weight;     // [C, D]
    const int64_t* labels; // [N]
    double* cosine;        // [N]
    int64_t* row;          // [N], the row of weight, or null
    Address bad_label;     // one element, set to label + 1, or to label if that is negative; or null
    int64_t samples, classes, size, ignore_index, sub_centers; // N, C, D, S
    bool inner_product;
};

// Replaces the products x_hat . w_j of a chunk of classes by 2^(a cos - k) / |w_j|, a = scale * log2(e), and sums
// 2^(a cos - k) over each row. The target's own entry becomes 0. The integer k keeps the result in range: it is
// fixed_exponent if given, else the integer nearest to the row's largest logit in this chunk, or that logit itself if
// it is above WideExponential::kLeast. The division by |w_j| lets both matrix products of the backward use the raw
// weights.
//
// With a bias, cos is product / |w_j| + bias_j. With sub-centers only the best of the S rows of a class counts, the
// first of equals, and all S entries of the target become 0. With a hard threshold, a cosine c above that of its row
// becomes h(c) = c (strength + c), or 0 without a strength, and the stored value is multiplied by h'(c).
template <class T> struct ExponentSum {
    T* logits_chunk; // in and out: [N, chunk] on CUDA, [chunk, N] on the CPU, whichever matrix product is fastest there
    const T* inverse_norm;        // [chunk], of the classes
    const T* bias;                // [chunk] or null
    const int64_t* labels;        // [N]
    const double* hard_threshold; // [N] or null
    const double* hard_strength;  // one element or null
    Scalar scale;                 // [N]
    OptionalNumber fixed_exponent;
    double* exponent;                                 // [N], k of every row
    double* sum;                                      // [N]
    int64_t samples, chunk, class_begin, sub_centers; // chunk and class_begin are multiples of S
};

// Margin and cross-entropy of every sample, and the derivatives of the sample's loss in everything it depends on.
enum class BeyondPi : int { monotone, linear, none };
struct MarginRows {
    const double* negative_logsumexp;    // [N]
    const double* target_cosine;         // [N]
    const double* uniform_cosine;        // [N], sum_j class_weight_j cos_j; or null without label smoothing
    const int64_t* labels;               // [N]
    const double* class_weight;          // [C] or null
    Scalar scale, m1, m2, m3, annealing; // [N]
    BeyondPi beyond_pi;
    bool easy, straight_through;
    double smallest_sine; // sqrt of the compute type's epsilon
    double label_smoothing;
    const double* class_weight_sum; // one element or null for C
    double* loss;                   // [N]
    double* row_weight;             // [N], class weight of the label, 0 for an ignored sample
    double* derivatives;            // [kMarginDerivatives, N], order of MarginDerivative
    int64_t samples, classes, ignore_index;
};
enum MarginDerivative {
    d_negative_logsumexp,
    d_target_cosine,
    d_uniform_cosine,
    d_scale,
    d_m1,
    d_m2,
    d_m3,
    d_annealing,
    kMarginDerivatives
};

// Completes the weight gradient of a chunk of classes from its dense part: adds the sparse terms (the samples' own
// classes, the pairs of nearest classes) and label smoothing, then applies the Jacobian of the normalisation while the
// chunk is still in cache.
template <class T> struct ProjectWeightGradient {
    T* gradient;           // [chunk, D], in: sum_i r_i E_ij x_hat_i / |w_j|, out: d weight
    MatrixView weight;     // [C, D]
    const T* inverse_norm; // [C], or null for 1
    // one element: the dense part is multiplied by it and by 1 / |w_j|; null if both factors are applied already
    const double* dense_scale;
    // the samples' own classes; null without embeddings
    const T* normalized_embeddings; // [N, D]
    const int64_t* sorted_labels;   // [N], ascending
    const int64_t* label_order;     // [N], the sample of every sorted label
    const double* target_gradient;  // [N], dL / d target cosine
    // label smoothing; null without it
    const T* uniform_direction; // [D], sum_i dL/d uniform cosine_i x_hat_i
    const double* class_weight; // [C] or null for 1
    // dL / d |w_j|, with inner products; null without it
    const double* length_gradient; // [C]
    // nearest classes; null without them
    const int64_t* nearest;        // [C]
    const int64_t* sorted_nearest; // [C], ascending
    const int64_t* nearest_order;  // [C], the class of every sorted nearest
    const T* nearest_gradient;     // [C], dL / d nearest cosine
    int64_t samples, classes, size, class_begin, chunk;
    bool inner_product; // inverse_norm is 1, and there is no Jacobian
};

// Completes the embedding gradient: row scale, target and label-smoothing terms, Jacobian of the normalisation.
template <class T> struct ProjectEmbeddingGradient {
    T* gradient;                    // [N, D], in: sum_j E_ij w_hat_j, out: d embeddings
    const T* normalized_embeddings; // [N, D]
    const T* inverse_norm;          // [N]
    MatrixView weight;              // [C, D]
    const T* weight_inverse_norm;   // [C]
    const int64_t* labels;          // [N]
    const double* row_scale;        // [N] or null if it is applied already
    Scalar scale;                   // [N]
    const double* target_gradient;  // [N]
    const double* uniform_gradient; // [N] or null
    const T* uniform_weight;        // [D] or null, sum_j class_weight_j w_hat_j
    double* scale_gradient;         // [N] or null, sum_j p_ij cos_ij scaled like the gradient
    int64_t samples, classes, size;
    bool inner_product; // normalized_embeddings are the raw ones, inverse_norm is 1, and there is no Jacobian
};

// Updates the nearest class of each row of a tile of cosines and, off the diagonal, of each column. Tiles must come in
// ascending class order: then a plain `greater than` gives ties to the lowest index.
template <class T> struct NearestTile {
    const T* scores; // [rows, columns], inner products of unit rows
    T* cosine;       // [C], the largest so far, below -1 at the start
    int64_t* index;  // [C]
    int64_t rows, columns, row_begin, column_begin;
};

} // namespace fm
