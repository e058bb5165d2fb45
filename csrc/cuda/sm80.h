// Functions for Ampere's instructions: cp.async, ldmatrix, mma.sync. Under FM_EMULATE they run on the host.
#pragma once

#include "device.h"

#include <cstdint>

#ifdef FM_EMULATE
#include "sm80_emulation.h"
#elif defined(__CUDACC__)

namespace fm::cuda::sm80 {

__device__ __forceinline__ uint32_t dynamic_shared() {
    extern __shared__ __align__(128) uint8_t memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

// Copies 16 bytes into shared memory, or zeros if not valid.
__device__ __forceinline__ void copy_async(uint32_t destination, const void* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most N of this thread's groups are incomplete.
template <int N> __device__ __forceinline__ void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// Loads four 8 x 8 matrices of fp16. Lane l provides the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrix(uint32_t (&fragment)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(address)
                 : "memory");
}

// c += a b, 16 x 8 += 16 x 16 times 16 x 8
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9},"
                 " {%0, %1, %2, %3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

} // namespace fm::cuda::sm80

#endif
