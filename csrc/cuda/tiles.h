// Deals the tiles of a product out to workers: every worker gets one run of tiles, row group after row group.
#pragma once

#include "device.h"
#include "tensor.h"

namespace fm::cuda {

struct Segment {
    int group, begin, end; // tiles [begin, end) of one group of rows
};

// Runs differ by at most one tile, and the row state an epilogue carries changes at most once per row group.
template <int kColumns> struct Tiles {
    int group_rows, tiles, group, tile, left;
    bool triangle; // only tiles that touch the upper triangle

    __device__ Tiles(const TensorProduct& p, int group_rows, bool triangle, int worker, int workers)
        : group_rows(group_rows), triangle(triangle) {
        tiles = static_cast<int>((p.columns + kColumns - 1) / kColumns);
        int groups = static_cast<int>((p.rows + group_rows - 1) / group_rows);
        int64_t total = 0;
        for (int g = 0; g < groups; ++g) total += tiles - first(g);
        int64_t begin = total * worker / workers;
        left = static_cast<int>(total * (worker + 1) / workers - begin);
        group = 0;
        while (group < groups && begin >= tiles - first(group)) begin -= tiles - first(group++);
        tile = first(group) + static_cast<int>(begin);
    }

    __device__ int first(int g) const { return triangle ? g * group_rows / kColumns : 0; }

    __device__ bool next(Segment& segment) {
        if (left <= 0) return false;
        int count = tiles - tile < left ? tiles - tile : left;
        segment = {group, tile, tile + count};
        left -= count;
        tile = first(++group);
        return true;
    }
};

// Split operands are multiplied in three passes: high by low, low by high, high by high. Low by low is below float32's
// rounding. The tensor cores round their sums towards zero, by an error as large as the sum's last bit: the large
// products come last, so that the small ones are summed before there is a large sum to be rounded.
__device__ inline int passes(const TensorProduct& p) { return p.parts == 2 ? 3 : 1; }
__device__ inline bool right_is_low(const TensorProduct& p, int pass) { return p.parts == 2 && pass == 0; }
__device__ inline bool left_is_low(const TensorProduct&, int pass) { return pass == 1; }

template <class Params> __device__ bool is_triangle(const Params&) { return false; }
__device__ inline bool is_triangle(const TensorNearest& p) { return p.row_begin == p.column_begin; }

} // namespace fm::cuda
