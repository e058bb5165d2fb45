// The family for Hopper: a persistent kernel with one producer that loads operands by TMA and two wgmma consumers.
//
// Each consumer warpgroup owns whole tiles, and the two alternate, so that the epilogue of one overlaps with the main
// loop of the other. A cluster of two thread blocks multiplies 256 rows, and loads each tile of classes once, by
// multicast. The rows of an unsplit operand stay in shared memory for all tiles of a block up to a width of 512; other
// rows are streamed too.
#include "epilogues.h"
#include "sm90.h"
#include "tiles.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace fm::cuda::sm90 {
namespace {

constexpr int kRows = 128;    // of a block
constexpr int kThreads = 384; // producer, two consumers
constexpr int kConsumerThreads = 256;
constexpr int kDepth = kWidthMultiple; // elements of a row that a stage holds: one 128-byte line
constexpr int kLineBytes = 2 * kDepth;
constexpr int kRowsBytes = kRows * kLineBytes; // a block's rows, one line deep
constexpr int kMostStages = 12;
constexpr int kBarrierBytes = 8 * (2 * kMostStages + 2);
constexpr int kSharedBytes = 232448; // the most that a block can have
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

// The division of the device into clusters and of shared memory into [rows that stay | ring of stages | barriers].
struct Layout {
    int cluster; // blocks per cluster
    int depth;   // lines of an operand's row
    int stages, stage_bytes;
    int rows_bytes; // of the rows that stay, or 0
    int shared_bytes() const { return rows_bytes + stages * stage_bytes + kBarrierBytes; }
};

// A position in the ring, and the parity of its current use.
struct Cursor {
    int stage;
    uint32_t parity;
    __device__ void advance(int count, int stages) {
        stage += count;
        while (stage >= stages) stage -= stages, parity ^= 1;
    }
};

struct Shared {
    uint32_t rows, ring, full, empty, rows_full, rows_empty;
    __device__ explicit Shared(const Layout& layout) {
        rows = dynamic_shared();
        ring = rows + static_cast<uint32_t>(layout.rows_bytes);
        full = ring + static_cast<uint32_t>(layout.stages * layout.stage_bytes);
        empty = full + 8 * kMostStages;
        rows_full = empty + 8 * kMostStages;
        rows_empty = rows_full + 8;
    }
    __device__ uint32_t stage(const Layout& layout, int s) const {
        return ring + static_cast<uint32_t>(s * layout.stage_bytes);
    }
    __device__ uint32_t full_of(int s) const { return full + 8 * static_cast<uint32_t>(s); }
    __device__ uint32_t empty_of(int s) const { return empty + 8 * static_cast<uint32_t>(s); }
};

// The number of lines that one tile multiplies.
__device__ int lines(const TensorProduct& p, const Layout& layout) { return layout.depth * passes(p); }

template <int kColumns, bool kStationary>
__device__ void produce(const TensorMap& left, const TensorMap& right, const TensorProduct& p, const Layout& layout,
                        const Shared& shared, Tiles<kColumns> schedule, uint32_t rank) {
    Cursor cursor{0, 1}; // the first wait on an empty stage returns at once
    uint32_t rows_parity = 1;
    int depth = layout.depth, count = lines(p, layout);
    int share = kColumns / layout.cluster; // each block of the cluster loads its share of a tile into all blocks
    auto all_blocks = static_cast<uint16_t>((1 << layout.cluster) - 1);
    Segment segment;
    while (schedule.next(segment)) {
        int row = (segment.group * layout.cluster + static_cast<int>(rank)) * kRows;
        if (kStationary) {
            barrier_wait(shared.rows_empty, rows_parity);
            rows_parity ^= 1;
            barrier_expect(shared.rows_full, static_cast<uint32_t>(layout.rows_bytes));
            for (int k = 0; k < depth; ++k)
                tma_load(shared.rows + static_cast<uint32_t>(k * kRowsBytes), &left, shared.rows_full, k * kDepth, row);
        }
        for (int tile = segment.begin; tile < segment.end; ++tile) {
            for (int k = 0; k < count; ++k) {
                int pass = k / depth, line = k % depth;
                uint32_t full = shared.full_of(cursor.stage), to = shared.stage(layout, cursor.stage);
                barrier_wait(shared.empty_of(cursor.stage), cursor.parity);
                barrier_expect(full, static_cast<uint32_t>(layout.stage_bytes));
                int part = static_cast<int>(rank) * share, x = (line + (right_is_low(p, pass) ? depth : 0)) * kDepth;
                uint32_t part_to = to + static_cast<uint32_t>(part * kLineBytes);
                if (layout.cluster > 1)
                    tma_load_multicast(part_to, &right, full, x, tile * kColumns + part, all_blocks);
                else
                    tma_load(part_to, &right, full, x, tile * kColumns);
                if (!kStationary)
                    tma_load(to + kColumns * kLineBytes, &left, full, (line + (left_is_low(pass) ? depth : 0)) * kDepth,
                             row);
                cursor.advance(1, layout.stages);
            }
        }
    }
}

template <class Epilogue, int kColumns, bool kStationary>
__device__ void consume(const typename Epilogue::Params& p, const Layout& layout, const Shared& shared,
                        Tiles<kColumns> schedule, uint32_t rank, int consumer, int slot) {
    int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32 % 4;
    int count = lines(p.product, layout), total = schedule.remaining, turn = 0;
    Cursor cursor{0, 0};
    uint32_t rows_parity = 0;
    Epilogue epilogue;
    float products[2][kColumns / 2];
    // each warp that has read the stage arrives once at every block that may write into it
    auto release = [&](int stage) {
        if (lane < layout.cluster) barrier_arrive(shared.empty_of(stage), static_cast<uint32_t>(lane));
    };
    if (consumer == 1 && total > 0) named_arrive(1, kConsumerThreads); // the first turn is consumer 0's
    Segment segment;
    while (schedule.next(segment)) {
        int row = (segment.group * layout.cluster + static_cast<int>(rank)) * kRows + warp * 16 + lane / 4;
        epilogue.begin(p, row);
        if (kStationary) {
            barrier_wait(shared.rows_full, rows_parity);
            rows_parity ^= 1;
        }
        for (int tile = segment.begin; tile < segment.end; ++tile, ++turn) {
            if (turn % 2 != consumer) {
                cursor.advance(count, layout.stages);
                continue;
            }
            named_sync(1 + consumer, kConsumerThreads);
            int previous = -1;
#pragma unroll 1
            for (int k = 0; k < count; ++k) {
                barrier_wait(shared.full_of(cursor.stage), cursor.parity);
                uint32_t stage = shared.stage(layout, cursor.stage);
                uint64_t b = descriptor(stage);
                uint64_t a = descriptor(kStationary ? shared.rows + static_cast<uint32_t>(k * kRowsBytes)
                                                    : stage + kColumns * kLineBytes);
                pin_registers(products[0]);
                pin_registers(products[1]);
                wgmma_fence();
                FM_UNROLL
                for (int i = 0; i < kDepth / 16; ++i) { // 16 elements at a time
                    FM_UNROLL
                    for (int m = 0; m < 2; ++m)
                        wgmma<kColumns>(products[m], a + m * 512 + i * 2, b + i * 2, k > 0 || i > 0);
                }
                wgmma_commit();
                pin_registers(products[0]);
                pin_registers(products[1]);
                wgmma_wait<1>();
                if (previous >= 0) release(previous);
                previous = cursor.stage;
                cursor.advance(1, layout.stages);
            }
            // the other consumer may use the tensor cores before the last product of this one is complete
            if (turn + 1 < total) named_arrive(1 + (consumer ^ 1), kConsumerThreads);
            wgmma_wait<0>();
            pin_registers(products[0]);
            pin_registers(products[1]);
            release(previous);
            int column = tile * kColumns;
            epilogue.tile(p, products, row, column, column + 2 * (lane % 4), lane);
        }
        if (kStationary && lane == 0) barrier_arrive(shared.rows_empty);
        epilogue.end(p, row, slot, lane);
    }
}

template <class Epilogue, int kColumns, bool kStationary> __global__ void __launch_bounds__(kThreads, 1)
    multiply_tiles(const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,
                   const __grid_constant__ typename Epilogue::Params p, const __grid_constant__ Layout layout) {
    Shared shared(layout);
    uint32_t rank = cluster_rank();
    if (threadIdx.x == 0) {
        for (int s = 0; s < layout.stages; ++s) {
            barrier_init(shared.full_of(s), 1);
            barrier_init(shared.empty_of(s), static_cast<uint32_t>(4 * layout.cluster)); // warps of one consumer
        }
        barrier_init(shared.rows_full, 1);
        barrier_init(shared.rows_empty, kConsumerThreads / 32);
        fence_barrier_init();
    }
    cluster_sync();
    int worker = static_cast<int>(blockIdx.x) / layout.cluster, workers = static_cast<int>(gridDim.x) / layout.cluster;
    Tiles<kColumns> schedule(p.product, kRows * layout.cluster, is_triangle(p), worker, workers);
    // a single if and else for the roles: the compiler must see that setmaxnreg is uniform in a warpgroup
    int group = __shfl_sync(kWholeWarp, static_cast<int>(threadIdx.x) / 128, 0);
    if (group == 0) {
        registers_decrease<kProducerRegisters>();
        if (threadIdx.x < 32 && elect_one())
            produce<kColumns, kStationary>(left, right, p.product, layout, shared, schedule, rank);
    } else {
        registers_increase<kConsumerRegisters>();
        consume<Epilogue, kColumns, kStationary>(p, layout, shared, schedule, rank, group - 1, worker * 2 + group - 1);
    }
    cluster_sync(); // no block exits while another may still write into it or arrive at its barriers
}

template <class Epilogue, int kColumns, bool kStationary>
void start(const typename Epilogue::Params& p, const Layout& layout, void* stream) {
    const TensorProduct& product = p.product;
    int64_t width = product.width * product.parts;
    TensorMap left, right;
    if (!make_map(&left, product.left, product.rows, width, kRows) ||
        !make_map(&right, product.right, product.columns, width, kColumns / layout.cluster))
        throw std::runtime_error("fused_margin: the driver refused a tensor map of " + std::to_string(product.rows) +
                                 " or " + std::to_string(product.columns) + " rows of " + std::to_string(width));
    int64_t groups = (product.rows + kRows * layout.cluster - 1) / (kRows * layout.cluster);
    int64_t tiles = (product.columns + kColumns - 1) / kColumns;
    auto kernel = multiply_tiles<Epilogue, kColumns, kStationary>;
    allow_shared_memory(kernel, kSharedBytes);
    int most = resident_clusters(kernel, layout.cluster, kThreads, layout.shared_bytes());
    launch_cluster(kernel, std::min<int64_t>(most, groups * tiles), layout.cluster, kThreads, layout.shared_bytes(),
                   stream, left, right, p, layout);
}

// The ring takes the shared memory that the rows leave.
template <class Epilogue, int kColumns> void start(const typename Epilogue::Params& p, void* stream) {
    if (p.product.rows == 0 || p.product.columns == 0) return;
    Layout layout{};
    layout.cluster = p.product.rows > kRows ? 2 : 1;
    layout.depth = static_cast<int>(p.product.width / kDepth);
    bool stationary = p.product.parts == 1 && layout.depth <= 8;
    layout.rows_bytes = stationary ? layout.depth * kRowsBytes : 0;
    layout.stage_bytes = kColumns * kLineBytes + (stationary ? 0 : kRowsBytes);
    layout.stages = std::min(kMostStages, (kSharedBytes - kBarrierBytes - layout.rows_bytes) / layout.stage_bytes);
    if (stationary)
        start<Epilogue, kColumns, true>(p, layout, stream);
    else
        start<Epilogue, kColumns, false>(p, layout, stream);
}

constexpr int kStride = 64; // rows between the two m64 products of a tile

} // namespace

void run(const TensorDump& p, void* stream) {
    if (p.wide)
        start<DumpEpilogue<2, 24, kStride>, 192>(p, stream);
    else
        start<DumpEpilogue<2, 16, kStride>, 128>(p, stream);
}

void run(const TensorExponentSum& p, void* stream) {
    if (!p.fixed_exponent.given)
        start<ExponentSumEpilogue<2, 16, kStride, true>, 128>(p, stream);
    else
        start<ExponentSumEpilogue<2, 24, kStride, false>, 192>(p, stream);
}

void run(const TensorProbabilities& p, void* stream) {
    if (p.product.parts == 2)
        start<ProbabilitiesEpilogue<2, 16, kStride, true>, 128>(p, stream);
    else
        start<ProbabilitiesEpilogue<2, 16, kStride, false>, 128>(p, stream);
}

void run(const TensorNearest& p, void* stream) { start<NearestEpilogue<2, 16, kStride>, 128>(p, stream); }

int slots() { return 2 * multiprocessors(); }

} // namespace fm::cuda::sm90
