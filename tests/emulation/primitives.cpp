// Small kernels on the emulator: a GEMM for each GPU family, and variants with one injected mistake, selected by name.
#include <cmath>
#include <string>

#include "sm80_emulation.h"
#include "sm90_emulation.h"

namespace {

const char* mistake = "";

bool injected(const char* name) { return strcmp(mistake, name) == 0; }

constexpr unsigned kAll = 0xffffffffu;
constexpr int kRows = 200, kColumns = 90, kDepth = 296; // no multiple of a tile
constexpr int kSteps = (kDepth + 63) / 64;

struct Gemm {
    const uint16_t *a, *b; // [rows, depth], [columns, depth]
    float* out;            // [rows, columns]
};

__device__ void store(const Gemm& p, int64_t row, int64_t column, float value) {
    if (row < kRows && column < kColumns) p.out[row * kColumns + column] = value;
}

namespace hopper {

using namespace fm::cuda::sm90;

constexpr int kWidth = 32, kStages = 2; // a tile: 64 rows, 32 columns
constexpr uint32_t kTileA = 64 * 128, kTileB = kWidth * 128, kStage = kTileA + kTileB;
constexpr int kShared = kStages * kStage + 16 * kStages;

__device__ uint64_t descriptor(uint32_t address) {
    return address >> 4 | 1ull << 16 | (injected("descriptor") ? 32ull : 64ull) << 32 | 1ull << 62;
}

// A cluster of two blocks shares one stream of B. Each has a producer warp and two warpgroups that alternate tiles.
__global__ void __launch_bounds__(384, 1)
    gemm(const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, const __grid_constant__ Gemm p) {
    constexpr int tiles = (kColumns + kWidth - 1) / kWidth;
    uint32_t base = dynamic_shared(), bars = base + kStages * kStage, rank = cluster_rank();
    auto full = [&](int i) { return bars + 8 * (i % kStages); };
    auto empty = [&](int i) { return bars + 8 * (kStages + i % kStages); };
    auto tile_a = [&](int i) { return base + i % kStages * kStage; };
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            barrier_init(full(s), 1);
            barrier_init(empty(s), injected("one warp releases") ? 2 : 8);
        }
        fence_barrier_init();
    }
    if (injected("no first cluster_sync"))
        __syncthreads();
    else
        cluster_sync();
    int row = static_cast<int>(blockIdx.x) * 64, group = __shfl_sync(kAll, threadIdx.x / 128, 0);
    if (group == 0) {
        registers_decrease<40>();
        if (threadIdx.x < 32 && elect_one())
            for (int i = 0; i < tiles * kSteps; ++i) {
                int x = i % kSteps * 64, y = i / kSteps * kWidth + static_cast<int>(rank) * kWidth / 2;
                barrier_wait(empty(i), (i / kStages & 1) ^ !injected("producer's parity"));
                barrier_expect(full(i), kStage + (injected("bytes") ? 128 : 0));
                tma_load(tile_a(i), &a, full(i), x, row);
                tma_load_multicast(tile_a(i) + kTileA + rank * kTileB / 2, &b, full(i), x, y, 3);
            }
    } else {
        registers_increase<232>();
        int mine = group - 1, warp = static_cast<int>(threadIdx.x) / 32 % 4, lane = static_cast<int>(threadIdx.x) % 32;
        auto release = [&](int i) {
            if (injected("a warp does not release") && warp == 2) return;
            if (injected("one warp releases") && warp != 3) return;
            if (lane < 2) barrier_arrive(empty(i), static_cast<uint32_t>(lane));
            if (injected("two releases") && lane == 0) barrier_arrive(empty(i));
        };
        if (mine == 1 && !injected("no first turn")) named_arrive(1, 256);
        for (int tile = mine; tile < tiles; tile += 2) {
            float sums[kWidth / 2];
            if (!injected("out of turn")) named_sync(1 + mine, 256);
            for (int k = 0; k < kSteps; ++k) {
                int i = tile * kSteps + k;
                if (!injected("no wait for a stage")) barrier_wait(full(i), i / kStages & 1);
                if (!injected("no fence")) wgmma_fence();
                uint64_t left = descriptor(tile_a(i)),
                         right = descriptor(tile_a(i) + (injected("misplaced tile") ? 256 : kTileA));
                for (int kk = 0; kk < 8; kk += 2) wgmma<kWidth>(sums, left + kk, right + kk, k + kk > 0);
                wgmma_commit();
                if (injected("early release")) release(i);
                wgmma_wait<1>();
                if (k > 0 && !injected("early release")) release(i - 1);
            }
            if (tile + 1 < tiles || injected("turn after the last")) named_arrive(2 - mine, 256);
            if (!injected("no last wait")) wgmma_wait<0>();
            pin_registers(sums);
            if (!injected("early release")) release(tile * kSteps + kSteps - 1);
            for (int i = 0; i < kWidth / 2; ++i)
                store(p, row + 16 * warp + lane / 4 + 8 * (i >> 1 & 1),
                      tile * kWidth + 8 * (i >> 2) + 2 * (lane % 4) + (i & 1), sums[i]);
        }
    }
    if (!injected("no last cluster_sync")) cluster_sync();
}

bool run(const Gemm& p) {
    TensorMap a, b;
    if (make_map(&a, p.a + 1, kRows, kDepth, 64) || make_map(&a, p.a, kRows, kDepth + 4, 64)) return false;
    if (!make_map(&a, p.a, kRows, kDepth, 64) || !make_map(&b, p.b, kColumns, kDepth, kWidth / 2)) return false;
    fm::cuda::launch_cluster(gemm, (kRows + 127) / 128, injected("no cluster") ? 1 : 2, 384, kShared, nullptr, a, b, p);
    return true;
}

} // namespace hopper

namespace ampere {

using namespace fm::cuda::sm80;

constexpr int kStages = 3, kThreads = 128, kSide = 32; // a tile: 32 x 32, a warp has 16 x 16 of it
constexpr uint32_t kTile = kSide * 128;

__global__ void gemm(const __grid_constant__ Gemm p) {
    uint32_t base = dynamic_shared();
    int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
    constexpr int columns = (kColumns + kSide - 1) / kSide;
    int row = static_cast<int>(blockIdx.x) / columns * kSide, column = static_cast<int>(blockIdx.x) % columns * kSide;
    auto at = [](uint32_t tile, int r, int chunk) {
        return tile + static_cast<uint32_t>(r * 128 + ((chunk ^ r % 8) << 4));
    };
    auto load = [&](int i) {
        for (int c = thread; (i < kSteps || injected("load beyond the end")) && c < kSide * 8; c += kThreads) {
            int r = c / 8, k = i * 64 + c % 8 * 8;
            uint32_t tile = base + i % kStages * 2 * kTile;
            copy_async(at(tile, r, c % 8), p.a + (row + r) * kDepth + k, row + r < kRows && k < kDepth);
            copy_async(at(tile + kTile, r, c % 8), p.b + (column + r) * kDepth + k,
                       column + r < kColumns && k < kDepth);
        }
        copy_commit();
    };
    float sums[2][4] = {};
    for (int i = 0; i < kStages - 1; ++i) load(i);
    for (int i = 0; i < kSteps; ++i) {
        if (injected("short wait"))
            copy_wait<kStages - 1>();
        else
            copy_wait<kStages - 2>();
        if (injected("early load")) load(i + kStages - 1);
        if (!injected("no barrier")) __syncthreads();
        if (!injected("early load")) load(i + kStages - 1);
        uint32_t tile = base + i % kStages * 2 * kTile;
        for (int chunk = 0; chunk < 8; chunk += 2) {
            uint32_t a[4], b[4];
            load_matrix(a, at(tile, warp / 2 * 16 + lane % 16, chunk + lane / 16));
            load_matrix(b, at(tile + kTile, warp % 2 * 16 + lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2));
            mma(sums[0], a, b[0], b[1]);
            mma(sums[1], a, b[2], b[3]);
        }
    }
    if (!injected("load beyond the end")) copy_wait<0>();
    for (int i = 0; i < 8; ++i)
        store(p, row + warp / 2 * 16 + lane / 4 + i / 2 % 2 * 8,
              column + warp % 2 * 16 + i / 4 * 8 + lane % 4 * 2 + i % 2, sums[i / 4][i % 4]);
}

void run(const Gemm& p) {
    int tiles = (kRows + kSide - 1) / kSide * ((kColumns + kSide - 1) / kSide);
    int shared = 2 * kTile * kStages - (injected("too little shared memory") ? 16 : 0);
    fm::cuda::launch_cluster(gemm, tiles, 1, kThreads, shared, nullptr, p);
}

} // namespace ampere

// With small integers sums are exact, so that any difference is an error.
template <class Run> bool same_as_loop(const Run& run) {
    alignas(16) static uint16_t a[kRows * kDepth], b[kColumns * kDepth];
    static float out[kRows * kColumns];
    uint32_t random = 1;
    auto fill = [&](uint16_t* data, int count) {
        for (int i = 0; i < count; ++i) {
            random = random * 1664525u + 1013904223u;
            data[i] = static_cast<uint16_t>(fm::cuda::pack_half(static_cast<float>(random >> 28) - 8.0f, 0.0f));
        }
    };
    fill(a, kRows * kDepth);
    fill(b, kColumns * kDepth);
    run(Gemm{a, b, out});
    for (int r = 0; r < kRows; ++r)
        for (int c = 0; c < kColumns; ++c) {
            float sum = 0.0f;
            for (int k = 0; k < kDepth; ++k)
                sum += fm::from_float16(a[r * kDepth + k]) * fm::from_float16(b[c * kDepth + k]);
            if (!(out[r * kColumns + c] == sum)) return false;
        }
    return true;
}

struct Collectives {
    unsigned long long* key;
    int* right; // [threads]
};

__global__ void collectives(Collectives p) {
    __shared__ int shared[64];
    int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
    if (injected("a lane leaves") && thread == 37) return;
    shared[thread] = thread;
    __syncthreads();
    bool right = shared[63 - thread] == 63 - thread && blockDim.x == 64 && gridDim.x == 3;
    right &= __shfl_xor_sync(kAll, thread, 5) == (thread ^ 5);
    right &= __shfl_sync(kAll, 0.5 * thread, lane / 8) == 0.5 * (thread - lane + lane / 8);
    right &= __ballot_sync(kAll, lane % 3 == 0) == 0x49249249u;
    right &= __any_sync(kAll, lane == 31) && !__any_sync(kAll, lane > 31);
    if (injected("another branch") && lane < 16)
        __shfl_xor_sync(kAll, thread, 1);
    else
        __syncwarp();
    if (thread == 63) return; // a barrier does not wait for threads that have exited
    __syncthreads();
    atomicMax(p.key, (static_cast<unsigned long long>(thread) << 32) + blockIdx.x);
    p.right[blockIdx.x * 64 + threadIdx.x] = right;
}

bool run_collectives() {
    unsigned long long key = 0;
    int right[3 * 64] = {};
    fm::cuda::launch(collectives, 3, 64, nullptr, Collectives{&key, right});
    for (int i = 0; i < 3 * 64; ++i)
        if (right[i] != (i % 64 != 63)) return false;
    return key == (62ull << 32) + 2;
}

// Every half is converted to itself, and a number between two adjacent halves to the nearer one, or to the even one
// from the middle.
bool halves_round() {
    auto low = [](float value) { return fm::cuda::pack_half(value, -1.0f); };
    for (uint32_t h = 0; h < 0x7c00u; ++h) {
        uint32_t high = 0xbc00u << 16, even = h + (h & 1);
        float value = fm::from_float16(static_cast<uint16_t>(h));
        float next = h == 0x7bffu ? 65536.0f : fm::from_float16(static_cast<uint16_t>(h + 1)),
              middle = 0.5f * (value + next);
        if (low(value) != (h | high) || low(-value) != (h | 0x8000u | high)) return false;
        if (low(middle) != (even | high)) return false;
        if (low(nextafterf(middle, 0.0f)) != (h | high) || low(nextafterf(middle, 1e9f)) != ((h + 1) | high))
            return false;
    }
    return low(INFINITY) << 16 == 0x7c000000u && low(-1e9f) << 16 == 0xfc000000u && low(NAN) << 16 == 0x7fff0000u;
}

// Small cases of the published models: the bit at which a term is truncated, and sums rounded towards zero.
template <class Unit> bool adds_like_tensor_cores() {
    auto sum = [](float accumulator, float product, int count) {
        float left[16] = {};
        emulation::Four right[16] = {};
        for (int k = 0; k < count; ++k) left[k] = 1.0f, right[k] += product;
        return emulation::add_products<Unit>(left, right, 1, emulation::Four{} + accumulator)[2];
    };
    constexpr float bit = 0x1p-23f; // the last bit of float32 at 1
    constexpr float cut = bit / (1 << Unit::kExtraBits);
    constexpr int all = Unit::kProducts;
    return sum(1.0f, cut, all) == 1.0f + all * cut && sum(1.0f, 0.99f * cut, all) == 1.0f &&
           sum(1.0f, -cut, 1) < 1.0f && sum(1.0f, -0.99f * cut, 1) == 1.0f && sum(1.0f, 0.75f * bit, 1) == 1.0f &&
           sum(2.0f, -bit, 1) == 2.0f - bit && sum(-1.0f, -0.75f * bit, 1) == -1.0f &&
           sum(0.0f, 3.0f, all) == 3.0f * all && sum(1e30f, 1e-30f, all) == 1e30f &&
           sum(0.0f, 0x1p-48f, all) == all * 0x1p-48f && sum(INFINITY, 1.0f, 1) == INFINITY &&
           std::isnan(sum(1.0f, NAN, 1)) && std::isnan(sum(INFINITY, -INFINITY, 1)) && sum(0.0f, 0.0f, all) == 0.0f;
}

} // namespace

int main(int argc, char** argv) {
    std::string family = argc > 1 ? argv[1] : "";
    if (argc > 2) mistake = argv[2];
    bool right = family == "sm90"     ? same_as_loop([](const Gemm& p) { hopper::run(p); })
                 : family == "sm80"   ? same_as_loop(ampere::run)
                 : family == "common" ? run_collectives()
                 : family == "sums"   ? adds_like_tensor_cores<emulation::HopperUnit>() &&
                                            adds_like_tensor_cores<emulation::AmpereUnit>()
                                      : family == "halves" && halves_round();
    if (!right) fprintf(stderr, "wrong result\n");
    return right ? 0 : 1;
}
