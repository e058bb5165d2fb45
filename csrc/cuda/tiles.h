// Distributes the tiles of a product among workers: each worker gets one contiguous run of tiles, ordered by row group.
#pragma once

#include "device.h"

#include "../kernels/tensor.h"

namespace fm::cuda {

struct Segment {
    int group, begin, end; // tiles [begin, end) of one group of rows
};

// Runs differ by at most one tile, and an epilogue begins a row group at most once per worker.
template <int kColumns> struct Tiles {
    int group_rows, tiles, group, tile, remaining;
    bool triangle; // only tiles that touch the upper triangle

    __device__ Tiles(const TensorProduct& p, int group_rows, bool triangle, int worker, int workers)
        : group_rows(group_rows), triangle(triangle) {
        tiles = static_cast<int>((p.columns + kColumns - 1) / kColumns);
        int groups = static_cast<int>((p.rows + group_rows - 1) / group_rows);
        int64_t total = 0;
        for (int g = 0; g < groups; ++g) total += tiles - first(g);
        int64_t begin = total * worker / workers;
        remaining = static_cast<int>(total * (worker + 1) / workers - begin);
        group = 0;
        while (group < groups && begin >= tiles - first(group)) begin -= tiles - first(group++);
        tile = first(group) + static_cast<int>(begin);
    }

    __device__ int first(int g) const { return triangle ? g * group_rows / kColumns : 0; }

    __device__ bool next(Segment& segment) {
        if (remaining <= 0) return false;
        int count = tiles - tile < remaining ? tiles - tile : remaining;
        segment = {group, tile, tile + count};
        remaining -= count;
        tile = first(++group);
        return true;
    }
};

// Split operands are multiplied in three passes: high by low, low by high, high by high. Low by low is smaller than
// float32's rounding error. The tensor cores round their sums towards zero, with an error as large as the last bit of
// the sum. The large products therefore come last: the small ones are added up before the sum is large.
__device__ inline int passes(const TensorProduct& p) { return p.parts == 2 ? 3 : 1; }
__device__ inline bool right_is_low(const TensorProduct& p, int pass) { return p.parts == 2 && pass == 0; }
__device__ inline bool left_is_low(int pass) { return pass == 1; }

template <class Params> __device__ bool is_triangle(const Params&) { return false; }
__device__ inline bool is_triangle(const TensorNearest& p) { return p.row_begin == p.column_begin; }

} // namespace fm::cuda
