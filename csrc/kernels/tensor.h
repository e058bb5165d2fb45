// The tensor-core kernels: the product of two fp16 operands, and the epilogues that consume it in registers.
//
// Two families implement them: sm90 (Hopper) and sm80 (every GPU since Ampere). One launch multiplies a block of rows
// with a chunk of classes; the size of the chunks bounds all memory. Arrays are contiguous.
#pragma once

#include "types.h"

namespace fm::cuda {

// Operands hold normalized rows times this power of two, so that neither a small entry nor the low half of a split
// entry is denormal in fp16.
inline constexpr float kOperandScale = 1024.0f;
// Exponentials are at most sqrt(2) before they are stored as fp16. Multiplied by this factor,
// exponentials down to 2^-39 stay above 0 in fp16.
inline constexpr float kProbabilityScale = 32768.0f;
inline constexpr int kWidthMultiple = 64; // one 128-byte line of fp16

// Normalizes rows into an operand. With two parts a row is [high, low]: the nearest fp16 of each entry, then the
// nearest fp16 of the remainder, so that a product of two operands keeps 22 bits of each.
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

// The product as accumulated. Tests of a device begin with this kernel: products of small integers must be exact.
struct TensorDump {
    TensorProduct product;
    bool wide;  // sm90: with the tile width of the exponent sum with a fixed exponent, else 128; sm80 has one width
    float* out; // [rows, columns]
};

// The constants of a sample: 16 bytes, loaded at each use instead of kept in registers.
struct TensorRow {
    float high, low; // a = scale * log2(e) in two parts: rounding a to one float would cost |a cos| / 2^25
    float exponent;
    int label; // -1 if the target is none of the classes
};
struct PrepareRows {
    const int64_t* labels;  // [N]
    Scalar scale;           // [N]
    const double* exponent; // [N], or null for an exponent below every logit of the row
    TensorRow* prepared;    // [N]
    int64_t samples;
};

// Sums 2^(a cos - k) over the classes of a chunk without the label's own. Each of `slots` thread groups adds to its own
// element of every row, in a fixed order. If fixed_exponent is given, it is k, and the scale is scale_value. Otherwise
// each slot finds its own k, for scales that differ by row or are too large for one k.
struct Partial {
    float sum, exponent; // represents sum * 2^exponent; starts as 0, 0
};
struct TensorExponentSum {
    TensorProduct product;     // embeddings, classes
    const TensorRow* prepared; // [N]
    double scale_value;
    OptionalNumber fixed_exponent;
    int64_t class_begin;
    Partial* partial; // [slots, N]
};

// Combines the sums of the slots into one logsumexp per row, and the integer power of two nearest to it.
struct CombinePartials {
    const Partial* partial;     // [slots, N]
    double* negative_logsumexp; // [N]
    double* exponent;           // [N], 0 for a row without classes
    int64_t slots, samples;
};

// Stores 2^(a cos - k) * kProbabilityScale of a chunk as fp16, with the label's own entry 0. With two parts the
// remainder goes to a second matrix, `low` elements further on.
struct TensorProbabilities {
    TensorProduct product;
    const TensorRow* prepared; // [N], k from CombinePartials
    int64_t class_begin;
    uint16_t* probabilities; // [N, stride], columns beyond the chunk are 0
    int64_t stride, low;     // stride is a multiple of 8
};

// Updates the nearest class of each row and column from the product of two chunks of classes, or from its upper
// triangle if the chunks are the same. A key orders by cosine, then by lowest index.
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

// X(params) for every struct that a family launches, and for the others
#define FM_TENSOR_PRODUCTS(X) X(TensorDump) X(TensorExponentSum) X(TensorProbabilities) X(TensorNearest)
#define FM_TENSOR_HELPERS(X) X(PackOperand) X(PrepareRows) X(CombinePartials) X(UnpackNearest)

#define FM_DECLARE(P) void run(const P&, void* stream);
FM_TENSOR_HELPERS(FM_DECLARE)

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
