// The family for every GPU since Ampere: cp.async into a ring of stages, ldmatrix, mma.sync.
//
// A persistent block of 2 x 4 warps multiplies 128 rows with 128 classes, each warp 64 with 32. Loads run ahead across
// tiles, so the ring drains only when the block changes to other rows.
#include "epilogues.h"
#include "sm80.h"
#include "tiles.h"

#include <algorithm>

namespace fm::cuda::sm80 {
namespace {

constexpr int kRows = 128, kColumns = 128; // of a block's tile
constexpr int kThreads = 256;
constexpr int kWarpRows = 64, kWarpColumns = 32; // 2 warps down, 4 across
constexpr int kM = kWarpRows / 16, kN = kWarpColumns / 8;
constexpr int kDepth = 32; // elements of a row that a stage holds
constexpr int kLineBytes = 2 * kDepth;
constexpr int kStages = 4;
constexpr int kOperandBytes = kRows * kLineBytes;         // of either operand, in one stage
constexpr int kSharedBytes = kStages * 2 * kOperandBytes; // 64 KiB: two blocks fit in 164 KiB, one in 100 KiB
constexpr int kMostBlocks = 2;                            // per multiprocessor

// The offset of 16 bytes of a line. The chunks of eight adjacent rows are in different banks.
__device__ uint32_t place(int row, int chunk) {
    return static_cast<uint32_t>(row * kLineBytes + ((chunk ^ (row >> 1 & 3)) << 4));
}

// Copies one line, at column x, of an operand's rows [begin, begin + 128) into a stage.
__device__ void load_operand(uint32_t to, const uint16_t* data, int rows, int width, int begin, int x) {
    FM_UNROLL
    for (int i = 0; i < kRows * 4 / kThreads; ++i) {
        int at = static_cast<int>(threadIdx.x) + i * kThreads, row = at / 4, chunk = at % 4;
        bool inside = begin + row < rows;
        int64_t from = inside ? static_cast<int64_t>(begin + row) * width + x + chunk * 8 : 0;
        copy_async(to + place(row, chunk), data + from, inside);
    }
}

template <class Epilogue, int kBlocks> __global__ void __launch_bounds__(kThreads, kBlocks)
    multiply_tiles(const __grid_constant__ typename Epilogue::Params p) {
    const TensorProduct& product = p.product;
    uint32_t memory = dynamic_shared();
    int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
    int down = warp / 4 * kWarpRows, across = warp % 4 * kWarpColumns;
    int slot = static_cast<int>(blockIdx.x) * 4 + warp % 4;
    int depth = static_cast<int>(product.width) / kDepth;
    int count = depth * passes(product);
    int half = static_cast<int>(product.width), width = half * product.parts;
    Epilogue epilogue;
    Tiles<kColumns> schedule(product, kRows, is_triangle(p), static_cast<int>(blockIdx.x), static_cast<int>(gridDim.x));
    Segment segment;
    while (schedule.next(segment)) {
        int first_row = segment.group * kRows, row = first_row + down + lane / 4;
        epilogue.begin(p, row);
        // the next line to load, kStages - 1 lines ahead of the line being multiplied
        int next_tile = segment.begin, next_line = 0;
        auto load = [&](int stage) {
            if (next_tile < segment.end) {
                int pass = next_line / depth, x = next_line % depth * kDepth;
                uint32_t to = memory + static_cast<uint32_t>(stage % kStages * 2 * kOperandBytes);
                load_operand(to, product.left, static_cast<int>(product.rows), width, first_row,
                             x + (left_is_low(pass) ? half : 0));
                load_operand(to + kOperandBytes, product.right, static_cast<int>(product.columns), width,
                             next_tile * kColumns, x + (right_is_low(product, pass) ? half : 0));
                if (++next_line == count) next_line = 0, ++next_tile;
            }
            copy_commit(); // even an empty group, so that waiting counts lines
        };
        for (int s = 0; s < kStages - 1; ++s) load(s);
        int stage = 0;
        for (int tile = segment.begin; tile < segment.end; ++tile) {
            float products[kM][4 * kN];
            FM_UNROLL
            for (int m = 0; m < kM; ++m) {
                FM_UNROLL
                for (int i = 0; i < 4 * kN; ++i) products[m][i] = 0.0f;
            }
#pragma unroll 1
            for (int k = 0; k < count; ++k) {
                copy_wait<kStages - 2>();
                __syncthreads(); // all copies are complete, and all threads have finished with the stage that is loaded
                                 // next
                load(stage + kStages - 1);
                uint32_t a = memory + static_cast<uint32_t>(stage * 2 * kOperandBytes), b = a + kOperandBytes;
                stage = (stage + 1) % kStages;
                FM_UNROLL
                for (int i = 0; i < kDepth / 16; ++i) {
                    uint32_t left[kM][4], right[kN / 2][4];
                    FM_UNROLL
                    for (int m = 0; m < kM; ++m)
                        load_matrix(left[m], a + place(down + m * 16 + lane % 16, i * 2 + lane / 16));
                    FM_UNROLL
                    for (int n = 0; n < kN / 2; ++n)
                        load_matrix(right[n],
                                    b + place(across + n * 16 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2));
                    FM_UNROLL
                    for (int m = 0; m < kM; ++m) {
                        FM_UNROLL
                        for (int n = 0; n < kN; ++n)
                            mma(reinterpret_cast<float (&)[4]>(products[m][4 * n]), left[m], right[n / 2][n % 2 * 2],
                                right[n / 2][n % 2 * 2 + 1]);
                    }
                }
            }
            int column = tile * kColumns + across;
            epilogue.tile(p, products, row, column, column + 2 * (lane % 4), lane);
        }
        copy_wait<0>();
        __syncthreads(); // the first loads of the next rows must not overwrite a stage that a warp still reads
        epilogue.end(p, row, slot, lane);
    }
}

// kBlocks per multiprocessor: with two blocks each has half as many registers.
template <class Epilogue, int kBlocks = kMostBlocks> void start(const typename Epilogue::Params& p, void* stream) {
    int64_t tiles = ((p.product.rows + kRows - 1) / kRows) * ((p.product.columns + kColumns - 1) / kColumns);
    if (tiles == 0) return;
    auto kernel = multiply_tiles<Epilogue, kBlocks>;
    allow_shared_memory(kernel, kSharedBytes);
    launch_cluster(kernel, std::min<int64_t>(kBlocks * multiprocessors(), tiles), 1, kThreads, kSharedBytes, stream, p);
}

} // namespace

void run(const TensorDump& p, void* stream) { start<DumpEpilogue<kM, kN, 16>>(p, stream); }

void run(const TensorExponentSum& p, void* stream) {
    if (!p.fixed_exponent.given)
        start<ExponentSumEpilogue<kM, kN, 16, true>, 1>(p, stream);
    else
        start<ExponentSumEpilogue<kM, kN, 16, false>>(p, stream);
}

void run(const TensorProbabilities& p, void* stream) {
    if (p.product.parts == 2)
        start<ProbabilitiesEpilogue<kM, kN, 16, true>>(p, stream);
    else
        start<ProbabilitiesEpilogue<kM, kN, 16, false>>(p, stream);
}

void run(const TensorNearest& p, void* stream) { start<NearestEpilogue<kM, kN, 16>>(p, stream); }

int slots() { return 4 * kMostBlocks * multiprocessors(); }

} // namespace fm::cuda::sm80
