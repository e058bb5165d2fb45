// Runs CUDA kernels on the host: every thread is a fiber, the blocks of a cluster run concurrently.
//
// Covers the part of CUDA that csrc/cuda uses: warp collectives, barriers, static and dynamic shared memory. The
// instructions of Hopper and Ampere are in sm90_emulation.h and sm80_emulation.h. The schedule is adversarial: a warp,
// then a block, runs alone as far as it can, from either end, and asynchronous operations complete as early and as late
// as a GPU permits, so that a missing wait or barrier gives a wrong result. A deadlock is an error.
#pragma once

#if defined(_FORTIFY_SOURCE) && _FORTIFY_SOURCE > 0
#error "compile with -U_FORTIFY_SOURCE, which reports a jump to another fiber's stack as an error"
#endif

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "../../csrc/math/element.h"

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static // blocks with static shared memory do not run concurrently

namespace emulation {

constexpr int kLanes = 32;
constexpr uint32_t kSharedBase = 1024; // not 0, so that an offset that is used as an address is found

struct Index {
    unsigned x;
};

struct Fiber {
    jmp_buf context;
    std::unique_ptr<char[]> stack;
    int thread, rank; // of its block in the cluster
    bool (*ready)(const void*);
    const void* condition; // the argument of ready
    const char* place;     // the operation that waits, with its address or number in detail
    uint32_t detail;
    bool late;      // continues when no other fiber can
    int unfinished; // asynchronous operations that it has not waited for
};

struct Warp {
    void* posts[kLanes]; // the arguments of each lane
    const char* place;
    int arrived;
    unsigned generation;
};

struct BarrierState {
    int arrived, expected;
    unsigned generation;
};

struct Block {
    std::vector<uint16_t> shared;
    int threads; // that have not exited
    BarrierState all, named[16];
};

inline Index thread_index, block_index, block_size, grid_size;
inline std::vector<Fiber> fibers; // as many as the largest cluster so far: a fiber outlives its kernel
inline std::vector<Warp> warps;
inline std::vector<Block> blocks;
inline BarrierState cluster;
inline int threads;          // of the cluster, that have not exited
inline unsigned first_block; // of the cluster
inline int self;             // the running fiber
inline jmp_buf scheduler;
inline void (*body)(const void*);
inline const void* argument;
inline bool (*idle)(); // the hardware's next operation when no thread can continue; false if there is none

inline int lane() { return self % kLanes; }
inline Block& block() { return blocks[fibers[self].rank]; }

[[noreturn]] inline void fail(const char* message, uint32_t detail = 0) {
    fprintf(stderr, "emulation: block %u, thread %u: %s", block_index.x, thread_index.x, message);
    fprintf(stderr, detail ? " %u\n" : "\n", detail);
    abort();
}

inline void select_fiber(int fiber) {
    self = fiber;
    thread_index.x = static_cast<unsigned>(fibers[fiber].thread);
    block_index.x = first_block + static_cast<unsigned>(fibers[fiber].rank);
}

// Fibers switch by jumps, because swapcontext makes a system call each time.
inline void switch_to_scheduler() {
    if (!_setjmp(fibers[self].context)) _longjmp(scheduler, 1);
}

inline void resume(int fiber) {
    select_fiber(fiber);
    if (!_setjmp(scheduler)) _longjmp(fibers[fiber].context, 1);
}

inline bool always(const void*) { return true; }
inline bool never(const void*) { return false; }

template <class Ready> void wait_until(const char* place, uint32_t detail, const Ready& ready) {
    if (ready()) return;
    Fiber& f = fibers[self];
    f.ready = [](const void* condition) { return (*static_cast<const Ready*>(condition))(); };
    f.condition = &ready;
    f.place = place;
    f.detail = detail;
    switch_to_scheduler();
}

inline void wait_until_idle(const char* place) {
    Fiber& f = fibers[self];
    f.ready = never;
    f.late = true;
    f.place = place;
    switch_to_scheduler();
}

inline void complete_if_full(BarrierState& m, int expected) {
    if (m.arrived == 0 || m.arrived < expected) return;
    m.arrived = 0;
    ++m.generation;
}

inline void arrive_and_wait(const char* place, uint32_t detail, BarrierState& m, int expected) {
    unsigned generation = m.generation;
    ++m.arrived;
    complete_if_full(m, expected);
    wait_until(place, detail, [&] { return m.generation != generation; });
}

// A collective of a warp: every lane provides a Post, and the last one calls complete(lanes) before any lane continues.
template <class Post, class Complete> void warp_collective(const char* place, Post& mine, const Complete& complete) {
    Warp& warp = warps[self / kLanes];
    if (warp.arrived == 0) warp.place = place;
    if (strcmp(warp.place, place) != 0) fail("other lanes of the warp are in another collective");
    warp.posts[lane()] = &mine;
    unsigned generation = warp.generation;
    if (++warp.arrived < kLanes) return wait_until(place, 0, [&] { return warp.generation != generation; });
    Post* lanes[kLanes];
    for (int l = 0; l < kLanes; ++l) lanes[l] = static_cast<Post*>(warp.posts[l]);
    complete(lanes);
    warp.arrived = 0;
    ++warp.generation;
}

inline uint8_t* shared(uint32_t address, uint32_t size, int rank = fibers[self].rank) {
    if (rank >= static_cast<int>(blocks.size())) fail("no such block in the cluster:", static_cast<uint32_t>(rank));
    if (blocks[rank].threads == 0) fail("touches shared memory of a block that has left, at", address);
    uint64_t offset = static_cast<uint64_t>(address) - kSharedBase;
    if (address < kSharedBase || offset + size > 2 * blocks[rank].shared.size())
        fail("outside of dynamic shared memory:", address);
    return reinterpret_cast<uint8_t*>(blocks[rank].shared.data()) + offset;
}

// The state of one fiber for the instructions of a GPU family. Empty again when its kernel ends.
template <class State> State& state(int fiber = self) {
    static std::vector<State> all;
    if (all.size() < fibers.size()) all.resize(fibers.size());
    return all[fiber];
}

// Asynchronous operations of one thread, oldest first, in commit groups.
template <class Operation> struct Groups {
    std::vector<Operation> operations;
    std::vector<size_t> ends; // of the committed groups

    void add(int fiber, const Operation& operation) {
        operations.push_back(operation);
        ++fibers[fiber].unfinished;
    }
    void commit() { ends.push_back(operations.size()); }
    // Operations of all groups but the newest.
    size_t due(size_t newest) const { return ends.size() > newest ? ends[ends.size() - newest - 1] : 0; }
    void retire(int fiber, size_t newest) {
        if (ends.size() <= newest) return;
        size_t count = due(newest);
        operations.erase(operations.begin(), operations.begin() + static_cast<std::ptrdiff_t>(count));
        ends.erase(ends.begin(), ends.end() - static_cast<std::ptrdiff_t>(newest));
        for (size_t& end : ends) end -= count;
        fibers[fiber].unfinished -= static_cast<int>(count);
    }
};

inline void run_fiber() {
    for (;;) {
        switch_to_scheduler(); // until a kernel is launched
        body(argument);
        if (fibers[self].unfinished) fail("leaves without waiting for its asynchronous operations");
        fibers[self].ready = never;
        fibers[self].place = nullptr;
        complete_if_full(cluster, --threads);
        complete_if_full(block().all, --block().threads);
    }
}

inline void make_fiber() {
    constexpr size_t size = 64 << 10;
    fibers.emplace_back().stack.reset(new char[size]);
    self = static_cast<int>(fibers.size()) - 1;
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = fibers.back().stack.get();
    start.uc_stack.ss_size = size;
    start.uc_link = nullptr;
    makecontext(&start, run_fiber, 0);
    if (!_setjmp(scheduler)) setcontext(&start);
}

[[noreturn]] inline void deadlock() {
    fprintf(stderr, "emulation: threads of one block or cluster wait for each other forever\n");
    for (size_t begin = 0, end = 0, count = kLanes * warps.size(); begin < count; begin = end) {
        const Fiber& f = fibers[begin];
        auto same = [&](const Fiber& o) { return o.rank == f.rank && o.place == f.place && o.detail == f.detail; };
        while (end < count && same(fibers[end])) ++end;
        if (f.place)
            fprintf(stderr, "  block %u, threads %d to %d: %s %u\n", first_block + static_cast<unsigned>(f.rank),
                    f.thread, fibers[end - 1].thread, f.place, f.detail);
    }
    abort();
}

inline bool random_bit() {
    static uint32_t state = 0;
    state = state * 1664525u + 1013904223u;
    return state >> 31;
}

// Each of these runs the fibers that can continue, and returns whether there were any.
inline bool run_warp(int warp) {
    bool moved = false;
    for (int fiber = warp * kLanes; fiber < (warp + 1) * kLanes; ++fiber) {
        if (!fibers[fiber].ready(fibers[fiber].condition)) continue;
        resume(fiber);
        moved = true;
    }
    return moved;
}

inline bool run_block(int rank) {
    int count = static_cast<int>(warps.size() / blocks.size());
    bool backwards = random_bit(), moved = false;
    for (int i = 0; i < count; ++i)
        while (run_warp(rank * count + (backwards ? count - 1 - i : i))) moved = true;
    return moved;
}

inline bool run_blocks() {
    int count = static_cast<int>(blocks.size());
    bool backwards = random_bit(), moved = false;
    for (int i = 0; i < count; ++i)
        while (run_block(backwards ? count - 1 - i : i)) moved = true;
    return moved;
}

inline bool run_late() {
    int count = kLanes * static_cast<int>(warps.size());
    bool backwards = random_bit();
    for (int i = 0; i < count; ++i) {
        int fiber = backwards ? count - 1 - i : i;
        if (!fibers[fiber].late) continue;
        fibers[fiber].late = false;
        resume(fiber);
        return true;
    }
    return false;
}

inline void run_cluster(int size, int block_threads, int shared_bytes) {
    threads = size * block_threads;
    cluster = {};
    blocks.resize(size);
    for (Block& b : blocks) {
        b.shared.assign((shared_bytes + 1) / 2, 0x7fff); // NaN
        b.threads = block_threads;
        b.all = {};
        for (BarrierState& m : b.named) m = {};
    }
    warps.assign(threads / kLanes, {});
    while (static_cast<int>(fibers.size()) < threads) make_fiber();
    for (int t = 0; t < threads; ++t) {
        Fiber& f = fibers[t];
        f.thread = t % block_threads;
        f.rank = t / block_threads;
        f.ready = always;
        f.late = false;
    }
    while (threads > 0)
        if (!run_blocks() && !run_late() && !(idle && idle())) deadlock();
    if (idle) idle(); // a transfer that is not complete fails, because its block has exited
    for (int rank = 0; rank < size; ++rank)
        for (uint32_t id = 0; id < 16; ++id)
            if (select_fiber(rank * block_threads); blocks[rank].named[id].arrived)
                fail("the block leaves a named barrier half full:", id);
}

} // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define blockDim emulation::block_size
#define gridDim emulation::grid_size

using std::min;

template <class T> T __shfl_sync(unsigned mask, T value, int source) {
    if (mask != 0xffffffffu) emulation::fail("a shuffle of part of a warp");
    struct Post {
        T value, result;
        int source;
    } post{value, value, source & (emulation::kLanes - 1)};
    emulation::warp_collective("shuffle", post, [](Post* const* lanes) {
        for (int l = 0; l < emulation::kLanes; ++l) lanes[l]->result = lanes[lanes[l]->source]->value;
    });
    return post.result;
}

template <class T> T __shfl_xor_sync(unsigned mask, T value, int lanes) {
    return __shfl_sync(mask, value, emulation::lane() ^ lanes);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    if (mask != 0xffffffffu) emulation::fail("a ballot of part of a warp");
    struct Post {
        bool predicate;
        unsigned result;
    } post{predicate != 0, 0};
    emulation::warp_collective("ballot", post, [](Post* const* lanes) {
        unsigned result = 0;
        for (int l = 0; l < emulation::kLanes; ++l) result |= static_cast<unsigned>(lanes[l]->predicate) << l;
        for (int l = 0; l < emulation::kLanes; ++l) lanes[l]->result = result;
    });
    return post.result;
}

inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { __ballot_sync(mask, 0); }

inline void __syncthreads() {
    emulation::Block& block = emulation::block();
    emulation::arrive_and_wait("__syncthreads", 0, block.all, block.threads);
}

inline unsigned long long atomicMax(unsigned long long* at, unsigned long long value) {
    unsigned long long old = *at;
    if (value > old) *at = value;
    return old;
}

template <class T> T __ldcg(const T* at) { return *at; }

namespace fm::cuda {

template <class... A> int& allowed_shared_memory(void (*kernel)(A...)) {
    static std::map<void (*)(A...), int> allowed;
    return allowed.emplace(kernel, 48 << 10).first->second; // the limit without permission
}

template <class... A> void allow_shared_memory(void (*kernel)(A...), int most_bytes) {
    allowed_shared_memory(kernel) = most_bytes;
}

template <class... A> void launch_cluster(void (*kernel)(A...), int64_t clusters, int cluster_size, int threads,
                                          int shared_bytes, void*, const A&... args) {
    if (threads % emulation::kLanes != 0) emulation::fail("a block of part of a warp");
    if (shared_bytes > allowed_shared_memory(kernel))
        emulation::fail("more dynamic shared memory than the kernel is allowed:", static_cast<uint32_t>(shared_bytes));
    auto call = [&] { kernel(args...); };
    emulation::body = [](const void* argument) { (*static_cast<const decltype(call)*>(argument))(); };
    emulation::argument = &call;
    emulation::block_size.x = static_cast<unsigned>(threads);
    emulation::grid_size.x = static_cast<unsigned>(clusters * cluster_size);
    for (int64_t c = 0; c < clusters; ++c) {
        emulation::first_block = static_cast<unsigned>(c * cluster_size);
        emulation::run_cluster(cluster_size, threads, shared_bytes);
    }
    emulation::argument = nullptr;
}

template <class P> void launch(void (*kernel)(P), int64_t blocks, int threads, void* stream, const P& params) {
    launch_cluster(kernel, blocks, 1, threads, 0, stream, params);
}

// ex2.approx.ftz: 1 at 0, elsewhere two units in the last place too large or too small. Denormals are 0.
inline float exp2_approx(float x) {
    constexpr float smallest = 0x1p-126f;
    if (fabsf(x) < smallest) return 1.0f;
    bool up = bits_of(x) * 2654435761u >> 31;
    float result = exp2f(x) * (up ? 1.0f + 0x1p-22f : 1.0f - 0x1p-22f);
    return result < smallest ? 0.0f : result; // NaN stays
}

inline uint32_t to_half(float value) {
    uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) return 0x7fffu;
    if (rest >= 0x477ff000u) return sign | 0x7c00u; // 65520 and more
    if (rest < 0x38800000u)
        return sign | (bits_of(float_of(rest) + 0.5f) - bits_of(0.5f)); // one ulp of 0.5 is one ulp of a denormal
    return sign | ((rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13);
}

inline uint32_t pack_half(float low, float high) { return to_half(low) | to_half(high) << 16; }
inline float low_half(uint32_t word) { return from_float16(static_cast<uint16_t>(word)); }
inline float high_half(uint32_t word) { return low_half(word >> 16); }

template <class Value> void load_aligned(const void* from, Value& value) {
    static_assert(sizeof value == 4 || sizeof value == 8 || sizeof value == 16);
    if (reinterpret_cast<uintptr_t>(from) % sizeof value != 0)
        emulation::fail("loads from an unaligned address, bytes:", sizeof value);
    memcpy(&value, from, sizeof value);
}
template <class Value> void store_aligned(void* to, const Value& value) {
    static_assert(sizeof value == 4 || sizeof value == 8 || sizeof value == 16);
    if (reinterpret_cast<uintptr_t>(to) % sizeof value != 0)
        emulation::fail("stores to an unaligned address, bytes:", sizeof value);
    memcpy(to, &value, sizeof value);
}
template <class Value> void store_16_bytes(void* to, const Value& value) {
    static_assert(sizeof value == 16);
    store_aligned(to, value);
}

inline int multiprocessors() { return 5; }

template <class... A> int resident_clusters(void (*)(A...), int cluster_size, int, int) {
    return multiprocessors() / cluster_size;
}

} // namespace fm::cuda
