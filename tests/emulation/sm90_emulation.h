// Hopper's instructions on the host: clusters, mbarriers, TMA and wgmma, with the signatures of csrc/cuda/sm90.h.
#pragma once

#include "emulation.h"
#include "inner_product.h"

namespace fm::cuda::sm90 {

struct TensorMap {
    const uint16_t* data;
    int64_t rows, width;
    int box_rows;
};

} // namespace fm::cuda::sm90

namespace emulation {

constexpr uint32_t kRowBytes = 128;

// The address of a byte after 128-byte swizzling.
inline uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// In shared memory, as on a GPU. A wrong seal shows that it is not initialised or has been overwritten.
struct Barrier {
    int64_t bytes : 22; // still expected; negative if they arrived before they were expected
    uint64_t count : 13, pending : 13, phase : 1, seal : 15;
};
static_assert(sizeof(Barrier) == 8);
constexpr uint64_t kSeal = 0x2a5c;

inline Barrier& barrier(uint32_t address, int rank = fibers[self].rank) {
    if (address % 8 != 0) fail("an mbarrier needs an 8-byte aligned address:", address);
    auto& b = *reinterpret_cast<Barrier*>(shared(address, sizeof(Barrier), rank));
    if (b.seal != kSeal) fail("no mbarrier here, not yet or overwritten:", address);
    return b;
}

inline void complete_phase(Barrier& b) {
    if (b.pending > 0 || b.bytes != 0) return;
    b.pending = b.count;
    b.phase ^= 1;
}

inline void arrive(uint32_t address, int rank, uint32_t bytes) {
    Barrier& b = barrier(address, rank);
    if (b.pending == 0) fail("more arrivals than the phase expects on the mbarrier at", address);
    b.bytes += bytes;
    --b.pending;
    complete_phase(b);
}

struct Transfer {
    int fiber;
    fm::cuda::sm90::TensorMap map;
    uint32_t destination, bar;
    int x, y;
    uint16_t mask;

    template <class Visit> void each_block(const Visit& visit) const {
        for (int rank = 0; rank < 16; ++rank)
            if (mask >> rank & 1) visit(rank);
    }
    uint32_t bytes() const { return static_cast<uint32_t>(map.box_rows) * kRowBytes; }

    void write_every_other_row(int first) const {
        each_block([&](int rank) {
            uint8_t* tile = shared(destination, bytes(), rank);
            for (int row = first; row < map.box_rows; row += 2)
                for (int k = 0; k < 64; ++k) {
                    int64_t r = static_cast<int64_t>(y) + row, c = static_cast<int64_t>(x) + k;
                    bool inside = r >= 0 && r < map.rows && c >= 0 && c < map.width;
                    uint16_t value = inside ? map.data[r * map.width + c] : 0;
                    uint32_t address =
                        destination + static_cast<uint32_t>(row) * kRowBytes + static_cast<uint32_t>(k) * 2;
                    memcpy(tile + (swizzle(address) - destination), &value, sizeof value);
                }
        });
    }
};

inline std::vector<Transfer> transfers;

// Completes the newest transfer: the order is arbitrary.
inline bool finish_transfer() {
    if (transfers.empty()) return false;
    Transfer t = transfers.back();
    transfers.pop_back();
    select_fiber(t.fiber);
    t.write_every_other_row(1);
    t.each_block([&](int rank) {
        Barrier& b = barrier(t.bar, rank);
        b.bytes -= t.bytes();
        complete_phase(b);
    });
    return true;
}

struct Product {
    float* accumulators;
    uint64_t a, b;
    int columns;
    bool accumulate;

    bool operator==(const Product& o) const {
        return a == o.a && b == o.b && columns == o.columns && accumulate == o.accumulate;
    }
};

struct Wgmma {
    Groups<Product> groups;
    bool fenced = false;
};

// Rows [first, first + count) of 16 halves of an operand, transposed: out[k * stride + row].
inline void read_operand(uint64_t descriptor, int first, int count, float* out, int stride) {
    if (descriptor >> 14 != (1ull << 2 | 64ull << 18 | 1ull << 48))
        fail("not a descriptor of a K-major tile with 128-byte swizzle");
    uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
    if (start & 0x390) fail("an operand begins neither at a tile's base nor at a K step of it:", start);
    uint32_t begin = (start & ~(kRowBytes - 1)) + static_cast<uint32_t>(first) * kRowBytes;
    const uint8_t* rows = shared(begin, static_cast<uint32_t>(count) * kRowBytes);
    for (int r = 0; r < count; ++r)
        for (int k = 0; k < 16; ++k) {
            uint32_t address =
                begin + static_cast<uint32_t>(r) * kRowBytes + start % kRowBytes + static_cast<uint32_t>(k) * 2;
            uint16_t value;
            memcpy(&value, rows + (swizzle(address) - begin), sizeof value);
            out[k * stride + r] = fm::from_float16(value);
        }
}

// Multiplies the 16 rows of one warp. The operations of the lanes differ only in the accumulators.
inline void multiply(const Product* const* lanes, int warp) {
    static float a[16][16]; // transposed, as read_operand leaves it
    static Four b[16][256 / 4];
    const Product& p = *lanes[0];
    read_operand(p.a, 16 * warp, 16, a[0], 16);
    read_operand(p.b, 0, p.columns, reinterpret_cast<float*>(b[0]), 256);
    for (int row = 0; row < 16; ++row) {
        float factors[16];
        for (int k = 0; k < 16; ++k) factors[k] = a[k][row];
        for (int column = 0; column < p.columns; column += 4) {
            auto accumulator = [&](int i) -> float& {
                return lanes[row % 8 * 4 + (column + i) % 8 / 2]->accumulators[column / 8 * 4 + row / 8 * 2 + i % 2];
            };
            Four sum{};
            for (int i = 0; p.accumulate && i < 4; ++i) sum[i] = accumulator(i);
            sum = add_products<HopperUnit>(factors, &b[0][column / 4], 256 / 4, sum);
            for (int i = 0; i < 4; ++i) accumulator(i) = sum[i];
        }
    }
}

inline BarrierState& named_barrier(int id, int threads) {
    if (id < 1 || id > 15 || threads % kLanes != 0) fail("no such named barrier:", static_cast<uint32_t>(id));
    BarrierState& m = block().named[id];
    if (m.arrived == 0) m.expected = threads;
    if (m.expected != threads) fail("threads disagree about how many wait at named barrier", static_cast<uint32_t>(id));
    return m;
}

} // namespace emulation

namespace fm::cuda::sm90 {

inline uint32_t dynamic_shared() { return emulation::kSharedBase; }
inline uint32_t cluster_rank() { return static_cast<uint32_t>(emulation::fibers[emulation::self].rank); }
inline void cluster_sync() { emulation::arrive_and_wait("cluster_sync", 0, emulation::cluster, emulation::threads); }

inline bool elect_one() {
    __syncwarp();
    return emulation::lane() == 0;
}

inline void barrier_init(uint32_t bar, uint32_t count) {
    if (count == 0 || count >= 1u << 13) emulation::fail("an mbarrier cannot count to", count);
    emulation::Barrier fresh{0, count, count, 0, emulation::kSeal};
    memcpy(emulation::shared(bar, sizeof fresh), &fresh, sizeof fresh);
}

inline void fence_barrier_init() {}

inline void barrier_arrive(uint32_t bar, uint32_t cta) { emulation::arrive(bar, static_cast<int>(cta), 0); }
inline void barrier_arrive(uint32_t bar) { barrier_arrive(bar, cluster_rank()); }
inline void barrier_expect(uint32_t bar, uint32_t bytes) {
    emulation::arrive(bar, static_cast<int>(cluster_rank()), bytes);
}

inline void barrier_wait(uint32_t bar, uint32_t parity) {
    const emulation::Barrier& b = emulation::barrier(bar);
    emulation::wait_until(parity ? "mbarrier, parity 1, at" : "mbarrier, parity 0, at", bar,
                          [&] { return b.phase != parity; });
}

inline bool make_map(TensorMap* map, const uint16_t* data, int64_t rows, int64_t width, int box_rows) {
    if (reinterpret_cast<uintptr_t>(data) % 16 != 0 || rows < 1 || width < 1 || width % 8 != 0) return false;
    if (box_rows < 1 || box_rows > 256) return false;
    *map = {data, rows, width, box_rows};
    return true;
}

// Half of the rows are written at once, which shows a stage that is still in use. The other half is written, and the
// bytes are counted, when no thread can continue, which shows a missing wait.
inline void start_transfer(uint32_t destination, const TensorMap* map, uint32_t bar, int x, int y, uint16_t mask) {
    if (destination % emulation::kRowBytes != 0) emulation::fail("a swizzled tile cannot lie at", destination);
    emulation::Transfer t{emulation::self, *map, destination, bar, x, y, mask};
    t.each_block([&](int rank) { emulation::barrier(bar, rank); });
    t.write_every_other_row(0);
    emulation::transfers.push_back(t);
    emulation::idle = emulation::finish_transfer;
}

inline void tma_load(uint32_t destination, const TensorMap* map, uint32_t bar, int x, int y) {
    start_transfer(destination, map, bar, x, y, static_cast<uint16_t>(1u << cluster_rank()));
}

inline void tma_load_multicast(uint32_t destination, const TensorMap* map, uint32_t bar, int x, int y, uint16_t mask) {
    if (emulation::blocks.size() < 2) emulation::fail("a multicast load in a launch without clusters");
    start_transfer(destination, map, bar, x, y, mask);
}

template <int N> void wgmma(float (&accumulators)[N / 2], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(N % 8 == 0 && N >= 8 && N <= 256);
    auto& mine = emulation::state<emulation::Wgmma>();
    if (!mine.fenced) emulation::fail("wgmma on accumulators touched since the last wgmma_fence");
    mine.groups.add(emulation::self, {accumulators, a, b, N, accumulate});
}

inline void wgmma_fence() { emulation::state<emulation::Wgmma>().fenced = true; }
inline void wgmma_commit() { emulation::state<emulation::Wgmma>().groups.commit(); }

// Reads operands after everything that other threads can do, so that a stage released too early has been overwritten.
template <int N> void wgmma_wait() {
    using namespace emulation;
    Wgmma& mine = state<Wgmma>();
    warp_collective("wgmma_wait", mine.groups, [](Groups<Product>* const* lanes) {
        int warp = self / kLanes;
        size_t due = lanes[0]->due(N);
        if (due) wait_until_idle("wgmma_wait");
        for (size_t i = 0; i < due; ++i) {
            const Product* operations[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                if (lanes[l]->due(N) != due || !(lanes[l]->operations[i] == lanes[0]->operations[i]))
                    fail("lanes of one warp disagree about a wgmma");
                operations[l] = &lanes[l]->operations[i];
            }
            multiply(operations, warp % 4);
        }
        for (int l = 0; l < kLanes; ++l) lanes[l]->retire(warp * kLanes + l, N);
    });
    if (N == 0) mine.fenced = false;
}

template <int N> void pin_registers(float (&)[N]) {}
template <int R> void registers_increase() { static_assert(R % 8 == 0 && R >= 24 && R <= 256); }
template <int R> void registers_decrease() { static_assert(R % 8 == 0 && R >= 24 && R <= 256); }

inline void named_sync(int id, int threads) {
    emulation::arrive_and_wait("named barrier", static_cast<uint32_t>(id), emulation::named_barrier(id, threads),
                               threads);
}

inline void named_arrive(int id, int threads) {
    emulation::BarrierState& m = emulation::named_barrier(id, threads);
    ++m.arrived;
    emulation::complete_if_full(m, threads);
}

} // namespace fm::cuda::sm90
