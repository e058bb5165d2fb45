// Kernels of the search for the nearest rows, exact through a screen of cheap products.
//
// Every row x_j (a unit row, or as it is for inner products) has a code that stands for it: q_j = scale_j code_j, in
// int8 or floating point, made some time ago. error_j bounds |x_j - q_j| for the row as it is now, whatever has become
// of it since, so
//
//     |x_i . x_j - q_i . q_j| <= error_i |x_j| + |q_i| error_j                                                   (*)
//
// A row's list holds the largest q_i . q_j, and its ceiling bounds all products that are not in it: what beats every
// bound that (*) gives for them is the nearest row. Cosines are compared, and returned, as `exact` has them: one sum in
// double, of one order. NaN rows have codes of zero, and are nobody's nearest.
#pragma once

#include "kernels.h"

namespace fm {

// One side of a search: rows, and what stands for them.
struct Coded {
    MatrixView rows;            // [R, D]
    const double* inverse_norm; // [R], of a row; 1 for inner products, and 0 for a zero row
    const float* scale;         // [R]
    const float* norm;          // [R], |x_j| rounded up; or null for 1
    const float* length;        // [R], |q_j| rounded up
    const float* error;         // [R], rounded up; -1 for a row with NaN
};

// The largest products of every query, in descending order; empty places have candidate -1, value -inf.
struct Lists {
    int32_t* candidate; // [Q, capacity], numbers of references
    float* value;       // [Q, capacity]
    float* ceiling;     // [Q], no product that is not in the list is larger; -inf for an empty list of nothing
    int64_t capacity;
};

// The k nearest of every query as found so far: larger cosines first, of equals the lower index; -inf and -1 where
// none.
struct Answers {
    double* cosine; // [Q, k]
    int64_t* index; // [Q, k], numbers of references
    int64_t count;  // k
};

// int8 codes of rows, and their scale.
struct EncodeRows {
    MatrixView rows;         // [R, D]
    const int64_t* selected; // [count] rows, or null for the first `count`
    bool inner_product;
    int8_t* code; // [R, D]
    float* scale; // [R]
    int64_t count, size;
};

// How far codes are from the rows that they stand for. `rounding` bounds what a computed product of two codes is off,
// over the product of their lengths; it becomes a part of the error.
struct MeasureCodes {
    MatrixView rows, code; // [R, D]
    const float* scale;    // [R]
    bool inner_product;
    double rounding;
    double* inverse_norm; // [R], 0 for a zero row
    float* norm;          // [R] or null where all are 1
    float* length;        // [R]
    float* error;         // [R], -1 for a row with NaN
    int64_t count, size;
};

// What a tile of products, or its rows and columns, are: int32 of int8 codes, or floating point.
struct ProductTile {
    const void* products; // [rows, columns]
    enum Type : int { integer, single, twice } type;
    int64_t rows, columns;
    const int64_t* row_place; // [rows], of what belongs to a row; or null for row_begin and on
    int64_t row_begin;
    const int64_t* row_number; // [rows], or null where it is the row's place
    int64_t column_begin;      // place of the first column
    int64_t column_first;      // number of the column in place 0
    bool one_set;              // rows and columns are of one set: equal numbers are the same row
};

// Offers the products of a tile to the lists of its rows, of its columns, or both.
struct OfferTile {
    ProductTile tile;
    const float* row_scale;    // [places of rows]
    const float* column_scale; // [places of columns]
    Lists of_rows, of_columns; // candidate null: they take nothing
    const bool* renewed;       // [places of columns] columns that take nothing; or null
};

// Empties the lists of renewed rows, and takes renewed candidates out of the others. A renewed row's ceiling is lowered
// by a quarter of what its first candidate was above it: what is offered and lies below would hardly stay in the list.
struct ForgetRenewed {
    Lists lists;                    // with all that is offered to a renewed row yet to come
    const bool* renewed_rows;       // [Q]
    const bool* renewed_candidates; // [numbers of references]
    int64_t count;                  // Q
};

// Looks at the candidates that may be among the nearest. To a row with NaN all cosines are NaN, to a zero row 0: its
// nearest are the first.
struct SettleCandidates {
    Coded query, reference;
    Lists lists;
    Answers answers;                     // in and out
    const int64_t* reference_place;      // [numbers] place of a reference, or -1: not here; or null:
    int64_t reference_first, references; // numbers from first on are here
    int64_t query_first;                 // number of the first query, if one_set
    bool one_set;
    int64_t queries, size;
};

// Looks at every column of a tile that may be among the nearest of a row, or at every row that may be of a column, or
// both: exact, whatever the lists hold.
struct ResolveTile {
    ProductTile tile;
    Coded query, reference;
    Answers of_rows, of_columns; // in and out; index null: they are not looked for
    const bool* renewed;         // [places of columns] columns that are not looked for; or null
    int64_t size;
};

} // namespace fm
