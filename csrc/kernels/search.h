// The kernels of the exact nearest-row search: inner products of quantized rows select the pairs that are compared in
// double.
//
// Every row x_j (a unit row, or the raw row for inner products) has a quantized form q_j = scale_j codes_j, in int8 or
// floating point, which may be older than the row. error_j bounds |x_j - q_j| for the row as it is now, whatever has
// changed since, so
//
//     |x_i . x_j - q_i . q_j| <= error_i |x_j| + |q_i| error_j                                                   (*)
//
// The candidates of a row are the references with the largest q_i . q_j, and its upper bound holds for all products
// that are not among them. A cosine above every bound that (*) gives for the other references is the largest. Cosines
// are compared, and returned, as sums in double in one fixed order. Rows with NaN have codes of zero and are the
// nearest row of no other.
#pragma once

#include "types.h"

namespace fm {

// One side of a search: rows and the measurements of their quantized form.
struct QuantizedRows {
    MatrixView rows;            // [R, D]
    const double* inverse_norm; // [R], of a row; 1 for inner products, and 0 for a zero row
    const float* scale;         // [R]
    const float* norm;          // [R], |x_j| rounded up; or null for 1
    const float* length;        // [R], |q_j| rounded up
    const float* error;         // [R], rounded up; -1 for a row with NaN
};

// The largest products of every query, in descending order. An empty entry has candidate -1 and value -inf.
//
// On the CPU the lists of a search may have numbers of entries instead: the entries are then in any order, and there
// are no empty ones. A product is appended, and a full list loses its smaller half.
struct CandidateLists {
    int32_t* candidate; // [Q, capacity], reference ids
    float* value;       // [Q, capacity]
    float* upper_bound; // [Q], of all products outside the list; -inf if there is none
    int32_t* count;     // [Q], number of entries; or null for lists in descending order
    int64_t capacity;
};

// The k nearest references of every query so far: larger cosines first, the lower index first among equals. An empty
// entry has cosine -inf and index -1.
struct Nearest {
    double* cosine; // [Q, k]
    int64_t* index; // [Q, k], reference ids
    int64_t count;  // k
};

// Quantizes rows to int8 codes and a scale.
struct QuantizeRows {
    MatrixView rows;         // [R, D]
    const int64_t* selected; // [count] rows, or null for the first `count`
    bool inner_product;
    int8_t* codes; // [R, D]
    float* scale;  // [R]
    int64_t count, size;
};

// Measures the distance of rows from their quantized form. `rounding` bounds the error of a computed product of two
// quantized rows, relative to the product of their lengths; it becomes a part of the error.
struct MeasureQuantization {
    MatrixView rows, codes; // [R, D]
    const float* scale;     // [R]
    double* inverse_norm;   // [R], 0 for a zero row
    float* norm;            // [R] or null if all are 1
    float* length;          // [R]
    float* error;           // [R], -1 for a row with NaN
    bool inner_product;
    double rounding;
    int64_t count, size;
};

// Products of quantized rows: int32 for int8 codes, or floating point.
struct Scores {
    const void* data; // [rows, columns]
    enum Type : int { int32, float32, float64 } type;
    int64_t rows, columns;
};

// A tile of scores and its position. An index is into the arrays of the rows' or the columns' side; an id identifies a
// row among all ranks.
struct ScoreTile {
    Scores scores;
    const int64_t* row_index; // [rows], or null for row_begin and the following indices
    int64_t row_begin;
    const int64_t* row_id;   // [rows], or null if it equals the index
    int64_t column_begin;    // index of the first column
    int64_t column_first_id; // id of the column with index 0
    bool same_set;           // rows and columns are of the same set: equal ids are the same row
};

// Inserts the products of a tile into the candidates of its rows, of its columns, or both.
struct UpdateCandidates {
    ScoreTile tile;
    const float* row_scale;                           // [rows of the row side]
    const float* column_scale;                        // [rows of the column side]
    CandidateLists row_candidates, column_candidates; // candidate null: not updated
    const bool* refreshed;                            // [rows of the column side] columns that are not updated; or null
};

// Empties the lists of refreshed rows and removes refreshed candidates from the others. The upper bound of a refreshed
// row is lowered by a quarter of its distance to the row's first candidate: a product below the new bound would hardly
// stay in the list.
struct RemoveRefreshed {
    CandidateLists candidates;        // every product of a refreshed row is still to be inserted
    const bool* refreshed_rows;       // [Q]
    const bool* refreshed_candidates; // [reference ids]
    int64_t count;                    // Q
};

// Computes the cosines of the candidates that may be among the nearest. A row with NaN has the cosine NaN with every
// reference and a zero row the cosine 0: their nearest are the first references.
struct RerankCandidates {
    QuantizedRows query, reference;
    CandidateLists candidates;
    Nearest nearest;                        // in and out
    int64_t reference_first_id, references; // the ids of the references start at reference_first_id
    int64_t query_first_id;                 // id of the first query, if same_set
    bool same_set;
    int64_t queries, size;
};

// Computes the cosine of every column of a tile that may be among the nearest of a row, of every row that may be among
// the nearest of a column, or both. The result is exact for any candidates.
struct SearchExact {
    ScoreTile tile;
    QuantizedRows query, reference;
    Nearest row_nearest, column_nearest; // in and out; index null: not searched
    const bool* refreshed;               // [rows of the column side] columns that are not searched; or null
    int64_t size;
};

} // namespace fm
