// Tensor-core kernels: the product of two fp16 operands, and three things done with it where it arises.
//
// Two families do the same work: sm90 (Hopper) and sm80 (every GPU since Ampere). One launch multiplies a
// block of rows with a chunk of classes; the callers' chunks bound all memory. Arrays are contiguous.
#pragma once

#include "../kernels.h"

namespace fm::cuda {

// Operands hold normalised rows times this power of two: then neither a small entry nor the low half of a
// split one is denormal in fp16.
inline constexpr float kOperandScale = 1024.0f;
// Exponentials are at most sqrt(2) before they are stored as fp16; times this they keep 39 bits below that.
inline constexpr float kProbabilityScale = 32768.0f;
inline constexpr int kWidthMultiple = 64; // one 128-byte line of fp16

enum class Family : int { sm80, sm90 };

// Normalises rows into an operand. With two parts a row is [high, low]: each entry's nearest fp16, then the
// nearest fp16 of what is left, so that a product of both operands keeps 22 bits of each.
struct PackOperand {
    MatrixView rows;     // [R, D]
    uint16_t* packed;    // [R, parts * width], zeros beyond D
    float* inverse_norm; // [R] or null
    int64_t count, size, width;
    int parts;
};

struct TensorProduct {
    const uint16_t* left;  // [rows, parts * width]
    const uint16_t* right; // [columns, parts * width]
    int64_t rows, columns, width;
    int parts;
};

// The product itself, as accumulated. What bringing up a device begins with: small integers must come out exact.
struct TensorDump {
    TensorProduct product;
    bool wide;  // in tiles of the exponent sum's width, else of the others'
    float* out; // [rows, columns]
};

// A sample as the kernels want it at hand: 16 bytes, read where they are needed rather than kept in registers.
struct TensorRow {
    float high, low; // a = scale * log2(e), split: rounding it would cost |a cos| / 2^25
    float exponent;
    int label;
};
struct PrepareRows {
    const int64_t* labels; // [N]
    const double* scale;   // [N] or null
    double scale_value;
    const double* exponent; // [N], or null for one below every logit of the row
    TensorRow* rows;        // [N]
    int64_t samples;
};

// Sum of 2^(a cos - k) over a chunk's classes, the label's own left out. `slots` thread groups each add to
// their own element of every row, in a fixed order. With `online` each slot finds its own k, for scales that
// differ by row or are too large for one k; else k is fixed_exponent and the scale scale_value.
struct Partial {
    float sum, exponent; // the sum is this times 2^exponent; starts as 0, 0
};
struct TensorExponentSum {
    TensorProduct product; // embeddings, classes
    const TensorRow* rows; // [N]
    bool online;
    double scale_value, fixed_exponent;
    int64_t class_begin;
    Partial* partial; // [slots, N]
};

// The slots' sums as one logsumexp of every row, and the integer power of two nearest to it.
struct CombinePartials {
    const Partial* partial;     // [slots, N]
    double* negative_logsumexp; // [N]
    double* exponent;           // [N], 0 where there is no class
    int64_t slots, samples;
};

// 2^(a cos - k) * kProbabilityScale over a chunk as fp16, the label's own entry 0; with two parts its rest
// in a second matrix, `low` elements further on.
struct TensorProbabilities {
    TensorProduct product;
    const TensorRow* rows; // [N], k from CombinePartials
    int64_t class_begin;
    uint16_t* probabilities; // [N, stride], columns beyond the chunk 0
    int64_t stride, low;     // stride is a multiple of 8
};

// Offers the product of two chunks of classes to the best of each of its rows and columns, as keys that
// order by cosine, then by lowest index. Where the chunks are the same, its upper triangle.
struct TensorNearest {
    TensorProduct product;
    int64_t row_begin, column_begin;
    unsigned long long* best; // [C], starts as 0
};
struct UnpackNearest {
    const unsigned long long* best; // [C]
    int64_t* index;                 // [C]
    int64_t count;
};

// X(params) for every struct above that a family launches, and for the others
#define FM_TENSOR_PRODUCTS(X) X(TensorDump) X(TensorExponentSum) X(TensorProbabilities) X(TensorNearest)
#define FM_TENSOR_HELPERS(X) X(PackOperand) X(PrepareRows) X(CombinePartials) X(UnpackNearest)

#define FM_DECLARE(P) void run(const P&, void* stream);
FM_TENSOR_HELPERS(FM_DECLARE)
#undef FM_DECLARE

#define FM_DECLARE(P) void run(const P&, void* stream);
namespace sm80 {
FM_TENSOR_PRODUCTS(FM_DECLARE)
int slots(); // of the current device
} // namespace sm80
namespace sm90 {
FM_TENSOR_PRODUCTS(FM_DECLARE)
int slots();
} // namespace sm90
#undef FM_DECLARE

} // namespace fm::cuda
