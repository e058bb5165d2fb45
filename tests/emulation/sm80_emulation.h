// Ampere's instructions on the host: cp.async, ldmatrix and mma.sync, with the signatures of csrc/cuda/sm80.h.
#pragma once

#include "emulation.h"
#include "inner_product.h"

namespace emulation {

struct Copy {
    uint8_t* destination;
    const void* source; // null: zeros

    void complete() const {
        if (source)
            memcpy(destination, source, 16);
        else
            memset(destination, 0, 16);
    }
};

} // namespace emulation

namespace fm::cuda::sm80 {

inline uint32_t dynamic_shared() { return emulation::kSharedBase; }

inline void copy_async(uint32_t destination, const void* source, bool valid) {
    if (destination % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(source) % 16 != 0))
        emulation::fail("cp.async needs 16-byte aligned addresses, destination", destination);
    emulation::Copy copy{emulation::shared(destination, 16), valid ? source : nullptr};
    // Copies complete as late as permitted, which shows a missing wait, or at once, which shows a buffer still in use.
    if (destination / 16 % 2)
        copy.complete();
    else
        emulation::state<emulation::Groups<emulation::Copy>>().add(emulation::self, copy);
}

inline void copy_commit() { emulation::state<emulation::Groups<emulation::Copy>>().commit(); }

template <int N> void copy_wait() {
    auto& groups = emulation::state<emulation::Groups<emulation::Copy>>();
    for (size_t i = 0, due = groups.due(N); i < due; ++i) groups.operations[i].complete();
    groups.retire(emulation::self, N);
}

inline void load_matrix(uint32_t (&fragment)[4], uint32_t address) {
    if (address % 16 != 0) emulation::fail("ldmatrix needs 16-byte aligned addresses:", address);
    struct Post {
        uint32_t* fragment;
        const uint8_t* row;
    } post{fragment, emulation::shared(address, 16)};
    emulation::warp_collective("ldmatrix", post, [](Post* const* lanes) {
        for (int l = 0; l < emulation::kLanes; ++l)
            for (int m = 0; m < 4; ++m) memcpy(&lanes[l]->fragment[m], lanes[8 * m + l / 4]->row + l % 4 * 4, 4);
    });
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    struct Post {
        float* c;
        const uint32_t* a;
        uint32_t b[2];
    } post{c, a, {b0, b1}};
    emulation::warp_collective("mma", post, [](Post* const* lanes) {
        using Unit = emulation::AmpereUnit;
        float a[16][16];
        emulation::Four b[16][2];
        for (int l = 0; l < emulation::kLanes; ++l)
            for (int half = 0; half < 2; ++half) {
                auto element = [&](uint32_t pair) { return from_float16(static_cast<uint16_t>(pair >> 16 * half)); };
                int k = 2 * (l % 4) + half, column = l / 4;
                for (int i = 0; i < 4; ++i) a[l / 4 + 8 * (i % 2)][k + 8 * (i / 2)] = element(lanes[l]->a[i]);
                for (int i = 0; i < 2; ++i) b[k + 8 * i][column / 4][column % 4] = element(lanes[l]->b[i]);
            }
        for (int row = 0; row < 16; ++row)
            for (int column = 0; column < 8; column += 4) {
                auto accumulator = [&](int i) -> float& {
                    return lanes[row % 8 * 4 + (column + i) / 2]->c[row / 8 * 2 + i % 2];
                };
                emulation::Four sum;
                for (int i = 0; i < 4; ++i) sum[i] = accumulator(i);
                for (int k = 0; k < 16; k += Unit::kProducts)
                    sum = emulation::add_products<Unit>(a[row] + k, &b[k][column / 4], 2, sum);
                for (int i = 0; i < 4; ++i) accumulator(i) = sum[i];
            }
    });
}

} // namespace fm::cuda::sm80
