// Every kernel the library has, as one plain params struct each; cpu:: and cuda:: both implement all of them.
//
// N samples, C classes, D embedding size, K chunks of classes. Arrays are contiguous unless they are
// a MatrixView. T (float or double) is the type the arithmetic over N x C and C x D runs in. What
// exists once per sample (logsumexp, target cosine, loss) is double: it costs nothing and it is what
// keeps the margin exact near cos = +-1.
#pragma once

#include <cstdint>

namespace fm {

enum class Dtype : int { float32, float64, float16, bfloat16, int8 };

// A matrix as its owner stores it: any dtype, strides in elements.
struct MatrixView {
    const void* data;
    Dtype dtype;
    int64_t row_stride, column_stride;
};

// Inverse L2 norm of every row, and the normalised rows where they are wanted. A row shorter than
// kSmallestNorm counts as a zero row: inverse norm 0, so its cosines and gradients are 0.
template <class T> struct RowNormalize {
    MatrixView rows;     // [R, D]
    T* normalized;       // [R, D] or null
    T* inverse_norm;     // [R]
    int64_t count, size; // R, D
};

// Cosine of every sample with its own class (or their inner product), accumulated in double from the
// unrounded inputs. With sub-centers, S rows of weight a class, it is the best row's, the first of equals.
// Labels outside [0, C / S) give 0 and row -1; those that are not ignore_index are reported through bad_label.
template <class T> struct TargetCosine {
    MatrixView embeddings; // [N, D]
    MatrixView weight;     // [C, D]
    const int64_t* labels; // [N]
    double* cosine;        // [N]
    int64_t* row;          // [N], of weight; or null
    int64_t* bad_label;    // one element, set to label + 1, or to label where it is negative; or null
    int64_t samples, classes, size, ignore_index, sub_centers; // N, C, D, S
    bool inner_product;
};

// Replaces products x_hat . w_j of one chunk by 2^(a cos - k) / |w_j|, a = scale * log2(e), with the
// target's own entry 0, and sums 2^(a cos - k) per row. k, an integer, keeps the result in range: one
// constant when `fixed`, else the row's own (nearest integer to its largest logit in this chunk).
// Dividing by |w_j| here lets both products of the backward run on the raw weights.
//
// With a bias cos is product / |w_j| + bias_j. With sub-centers only the best of a class's S rows counts,
// the first of equals, and the target's entries are all S. With a hard threshold a cosine c above the row's
// becomes h(c) = c (strength + c), or 0 where there is no strength, and what is stored is multiplied by h'(c).
template <class T> struct ExponentSum {
    T* products; // in and out; [N, chunk] on CUDA, [chunk, N] on the CPU: what each one's products are fastest in
    const T* inverse_norm;        // [chunk], of the classes
    const T* bias;                // [chunk] or null
    const int64_t* labels;        // [N]
    const double* hard_threshold; // [N] or null
    const double* hard_strength;  // one element or null
    const double* scale;          // [N] or null
    double scale_value;           // used where scale is null
    bool fixed;
    double fixed_exponent;                            // k
    double* exponent;                                 // [N], k of every row
    double* sum;                                      // [N]
    int64_t samples, chunk, class_begin, sub_centers; // chunk and class_begin are multiples of S
};

// The N-sized end of the loss: margin, cross-entropy, and the derivative of every row's loss in all it
// depends on.
struct Scalar {           // one number for all samples, or one each
    const double* values; // [N] or null
    double value;
};
enum class BeyondPi : int { monotone, linear, none };
struct MarginRows {
    const double* negative_logsumexp; // [N]
    const double* target_cosine;      // [N]
    const double* uniform_cosine;     // [N], sum_j class_weight_j cos_j; or null without label smoothing
    const int64_t* labels;            // [N]
    const double* class_weight;       // [C] or null
    Scalar scale, m1, m2, m3, annealing;
    BeyondPi beyond_pi;
    bool easy, straight_through;
    double smallest_sine; // sqrt of the compute type's epsilon
    double label_smoothing;
    const double* class_weight_sum; // one element, or null for C
    double* loss;                   // [N]
    double* row_weight;             // [N], class weight of the label, 0 where ignored
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

// Turns the dense part of a chunk's weight gradient into the gradient: adds what touches few rows (the
// samples' own classes, the nearest-class pairs, label smoothing), then applies the normalisation's
// Jacobian, while the chunk is still in cache.
template <class T> struct ProjectWeightGradient {
    T* gradient;           // [chunk, D], in: sum_i r_i E_ij x_hat_i / |w_j|, out: d weight
    MatrixView weight;     // [C, D]
    const T* inverse_norm; // [C]
    // one element: what the dense part still lacks as a factor, beside 1 / |w_j|; null where it lacks neither
    const double* dense_scale;
    // samples' own classes; null without embeddings
    const T* normalized_embeddings; // [N, D]
    const int64_t* sorted_labels;   // [N], ascending
    const int64_t* label_order;     // [N], sample of every sorted label
    const double* target_gradient;  // [N], dL / d target cosine
    // label smoothing; null without
    const T* uniform_direction; // [D], sum_i dL/d uniform cosine_i x_hat_i
    const double* class_weight; // [C] or null for 1
    // nearest class; null without
    const int64_t* nearest;        // [C]
    const int64_t* sorted_nearest; // [C], ascending
    const int64_t* nearest_order;  // [C], class of every sorted nearest
    const T* nearest_gradient;     // [C], dL / d nearest cosine
    int64_t samples, classes, size, class_begin, chunk;
    bool inner_product; // then inverse_norm is 1 and there is no Jacobian
};

// The same for the embeddings: row scale, target and label-smoothing terms, Jacobian.
template <class T> struct ProjectEmbeddingGradient {
    T* gradient;                    // [N, D], in: sum_j E_ij w_hat_j, out: d embeddings
    const T* normalized_embeddings; // [N, D]
    const T* inverse_norm;          // [N]
    MatrixView weight;              // [C, D]
    const T* weight_inverse_norm;   // [C]
    const int64_t* labels;          // [N]
    const double* row_scale;        // [N] or null where it is applied already
    const double* scale;            // [N] or null
    double scale_value;
    const double* target_gradient;  // [N]
    const double* uniform_gradient; // [N] or null
    const T* uniform_weight;        // [D] or null, sum_j class_weight_j w_hat_j
    double* scale_gradient;         // [N] or null, sum_j p_ij cos_ij scaled like the gradient
    int64_t samples, classes, size;
    bool inner_product; // then normalized_embeddings are not, inverse_norm is 1 and there is no Jacobian
};

// Offers one tile of cosines to the best class of each of its rows and, off the diagonal, of each of its
// columns. Tiles must come in ascending class order: then `greater` alone gives ties to the lowest index.
template <class T> struct NearestTile {
    const T* products; // [rows, columns], of unit rows
    T* cosine;         // [C], best so far, below -1 at the start
    int64_t* index;    // [C]
    int64_t rows, columns, row_begin, column_begin;
};

inline constexpr double kSmallestNorm = 1e-12;

// Marks a product that takes no part in its row's sum; no product of rows that have norms is that low.
template <class T> inline constexpr T kLeftOut = static_cast<T>(-3.0e38);

} // namespace fm
