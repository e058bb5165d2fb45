// Runs CUDA kernels on the host: every thread of a block is a fiber, blocks run one after another.
//
// Enough of the dialect for csrc/cuda: warp shuffles, block barriers, static shared memory. A fiber runs
// until it needs the others (a shuffle or a barrier), then the next one does. Lanes that wait for a lane
// that left or took another branch are an error, as they would be a hang or garbage on a GPU.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __shared__ static // blocks do not run concurrently

namespace emulation {

struct Index {
    unsigned x;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
    unsigned shuffles, barriers; // how many of each this thread has reached
    bool at_barrier;
};

constexpr int kLanes = 32;

struct Block {
    ucontext_t scheduler;
    std::vector<Fiber> fibers;
    std::vector<uint64_t> slots[2]; // what each lane put into its warp's shuffle; even and odd ones
    int current;
    void (*body)(void*);
    void* argument;
};

inline Block block;
inline Index thread_index, block_index;

inline void enter() {
    block.body(block.argument);
    block.fibers[block.current].done = true;
    swapcontext(&block.fibers[block.current].context, &block.scheduler);
}

inline void yield() {
    int self = block.current;
    swapcontext(&block.fibers[self].context, &block.scheduler);
    thread_index.x = static_cast<unsigned>(self);
}

inline bool ready(int t) {
    const Fiber& f = block.fibers[t];
    int threads = static_cast<int>(block.fibers.size());
    int begin = f.at_barrier ? 0 : t / kLanes * kLanes, end = f.at_barrier ? threads : begin + kLanes;
    for (int o = begin; o < end; ++o) {
        const Fiber& other = block.fibers[o];
        if (f.at_barrier ? (!other.done && other.barriers < f.barriers) : other.shuffles < f.shuffles) return false;
    }
    return true;
}

inline void run_block(int threads, void (*body)(void*), void* argument) {
    block.body = body;
    block.argument = argument;
    block.fibers.resize(threads);
    for (auto& slots : block.slots) slots.resize(threads);
    for (Fiber& f : block.fibers) {
        f.stack.resize(64 << 10);
        f.done = f.at_barrier = false;
        f.shuffles = f.barriers = 0;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, enter, 0);
    }
    for (int left = threads; left > 0;) {
        bool moved = false;
        for (int t = 0; t < threads; ++t) {
            Fiber& f = block.fibers[t];
            if (f.done || !ready(t)) continue;
            moved = true;
            block.current = t;
            thread_index.x = static_cast<unsigned>(t);
            swapcontext(&block.scheduler, &f.context);
            left -= f.done;
        }
        if (!moved) {
            fprintf(stderr, "emulation: threads of one block wait for each other forever\n");
            abort();
        }
    }
}

} // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    using namespace emulation;
    int self = block.current;
    Fiber& f = block.fibers[self];
    auto& slots = block.slots[f.shuffles & 1];
    memcpy(&slots[self], &value, sizeof value);
    ++f.shuffles;
    f.at_barrier = false;
    yield();
    memcpy(&value, &slots[self ^ mask], sizeof value);
    return value;
}

inline void __syncthreads() {
    emulation::Fiber& f = emulation::block.fibers[emulation::block.current];
    ++f.barriers;
    f.at_barrier = true;
    emulation::yield();
}

namespace fm::cuda {

template <class P> void launch(void (*kernel)(P), int64_t blocks, int threads, void*, const P& params) {
    struct Call {
        void (*kernel)(P);
        const P* params;
    } call{kernel, &params};
    for (int64_t b = 0; b < blocks; ++b) {
        emulation::block_index.x = static_cast<unsigned>(b);
        emulation::run_block(
            threads,
            [](void* argument) {
                auto* c = static_cast<Call*>(argument);
                c->kernel(*c->params);
            },
            &call);
    }
}

} // namespace fm::cuda
