// The optimizer step of the rows of a class weight, from a gradient that is stored for a few rows at a time only.
#pragma once

#include "loss.h"

namespace fm {

// g is the gradient of a row w, m its momentum (first moment) and v its second moment, as in torch.optim.
enum class UpdateRule : int {
    sgd,      // g += decay w; m = beta1 m + g; w -= lr m
    nesterov, // g += decay w; m = beta1 m + g; w -= lr (g + beta1 m)
    adam,     // g += decay w; m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g^2;
              // w -= lr / correction1 * m / (sqrt(v) / sqrt(correction2) + eps)
    adamw     // w -= lr decay w, then as adam without decay
};
struct Update {
    UpdateRule rule;
    double lr, beta1, beta2, eps, weight_decay;
    double correction1, correction2; // 1 - beta^t at step t; 1 for sgd
};

// Completes the gradient of rows as ProjectWeightGradient does, steps the rows and, if `project`, divides each by its
// norm. Weight and moments are read and written once; the gradient is overwritten. Arithmetic is in T. Results do not
// depend on the number of threads, nor on how the rows are divided among launches.
//
// Rows in bfloat16 are rounded to nearest, or stochastically: the upper or the lower neighbour, with a probability that
// makes the expected value exact. The random bits of element d of row r come from Philox with key `seed` and counter
// (d / 4, r, step).
template <class T> struct StepRows {
    ProjectWeightGradient<T> completion;
    const T* added;            // [C, D], added to the completed gradient of classes; or null
    const int64_t* selected;   // [chunk], the row of weight of each row of the gradient; null for class_begin + i
    MutableRows parameter;     // [P, D], with the dtype of completion.weight
    MutableRows momentum;      // [P, D] or null
    MutableRows second_moment; // [P, D] or null
    Update update;
    bool project;
    bool momentum_only; // m = beta1 m + g, and nothing else; only for sgd
    bool stochastic;
    int64_t seed, step, first_row; // first_row is added to r
    const bool* skip;              // one element: whether to leave everything as it is; or null
};

} // namespace fm
