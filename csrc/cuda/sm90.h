// Functions for Hopper's instructions: TMA, mbarrier, wgmma, clusters. Under FM_EMULATE they run on the host.
//
// Like the instructions, they address shared memory by 32-bit addresses within the block's window.
#pragma once

#include "device.h"

#include <cstdint>

#ifdef FM_EMULATE
#include "sm90_emulation.h"
#else
#include <cuda.h> // types only: libcuda is not linked
#endif

namespace fm::cuda::sm90 {

// The descriptor of an operand in shared memory with rows of 128 bytes, swizzled in groups of 8 rows, 1024-byte
// aligned. Adding 2 advances by 16 elements along the rows, adding 512 by 64 rows.
__device__ inline uint64_t descriptor(uint32_t address) {
    return static_cast<uint64_t>((address & 0x3ffff) >> 4) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

#ifndef FM_EMULATE

using TensorMap = CUtensorMap;

// Makes the map of a [rows, width] fp16 matrix that is read in boxes of box_rows x 64, with zeros outside. Returns
// false if TMA cannot read it.
inline bool make_map(TensorMap* map, const uint16_t* data, int64_t rows, int64_t width, int box_rows) {
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found{};
        bool ok = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault,
                                                   &found) == cudaSuccess &&
                  found == cudaDriverEntryPointSuccess;
        return ok ? reinterpret_cast<Encode>(entry) : nullptr;
    }();
    if (!encode || reinterpret_cast<uintptr_t>(data) % 16 || width % 8 || box_rows > 256) return false;
    cuuint64_t size[2] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(rows)};
    cuuint64_t stride[1] = {static_cast<cuuint64_t>(width) * 2};
    cuuint32_t box[2] = {64, static_cast<cuuint32_t>(box_rows)}, step[2] = {1, 1};
    return encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, const_cast<uint16_t*>(data), size, stride, box, step,
                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t dynamic_shared() {
    extern __shared__ __align__(1024) uint8_t memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ void cluster_sync() {
    __syncwarp(); // aligned instructions need the whole warp, even if one lane has just diverged
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
    return elected != 0;
}

__device__ __forceinline__ void barrier_init(uint32_t bar, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and adds to the bytes that this phase waits for.
__device__ __forceinline__ void barrier_expect(uint32_t bar, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
// Arrives at the same barrier of another block of the cluster. Without .release.cluster, which would put a memory fence
// of the whole GPU into the inner loop: wgmma has already read the stage that is released here.
__device__ __forceinline__ void barrier_arrive(uint32_t bar, uint32_t block) {
    asm volatile("{.reg .b32 remote;\n mapa.shared::cluster.u32 remote, %0, %1;\n"
                 " mbarrier.arrive.shared::cluster.b64 _, [remote];}" ::"r"(bar),
                 "r"(block)
                 : "memory");
}
__device__ __forceinline__ bool barrier_try(uint32_t bar, uint32_t parity) {
    uint32_t done;
    asm volatile("{.reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(bar), "r"(parity)
                 : "memory");
    return done != 0;
}
// Waits until the phase of this parity is complete. A new barrier counts as having completed parity 1.
__device__ __forceinline__ void barrier_wait(uint32_t bar, uint32_t parity) {
#ifdef FM_TRAP_AFTER // in nanoseconds, not polls: a poll may take as long as the time limit of the hardware
    uint64_t begin, now;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
    while (!barrier_try(bar, parity)) {
        asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
        if (now - begin > FM_TRAP_AFTER) __trap();
    }
#else
    while (!barrier_try(bar, parity)) {
    }
#endif
}

// Loads the box at element x of row y. The barrier counts its bytes.
__device__ __forceinline__ void tma_load(uint32_t destination, const TensorMap* map, uint32_t bar, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4}], [%2];" ::"r"(destination),
                 "l"(map), "r"(bar), "r"(x), "r"(y)
                 : "memory");
}
// Loads the box into every block of the cluster whose bit is set in mask. The barrier of each block counts the bytes.
__device__ __forceinline__ void tma_load_multicast(uint32_t destination, const TensorMap* map, uint32_t bar, int x,
                                                   int y, uint16_t mask) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
                 "l"(map), "r"(bar), "r"(x), "r"(y), "h"(mask)
                 : "memory");
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// Prevents the compiler from moving accumulators while wgmma writes them.
template <int N> __device__ __forceinline__ void pin_registers(float (&registers)[N]) {
    FM_UNROLL
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int N> __device__ __forceinline__ void wgmma(float (&d)[N / 2], uint64_t a, uint64_t b, bool accumulate);

#define FM_R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FM_R16(i) FM_R4(i), FM_R4(i + 4), FM_R4(i + 8), FM_R4(i + 12)
#define FM_R32(i) FM_R16(i), FM_R16(i + 16)
#define FM_R64(i) FM_R32(i), FM_R32(i + 32)

template <> __device__ __forceinline__ void wgmma<128>(float (&d)[64], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, %64, %65, p, 1, 1, 0, 0;}"
                 : FM_R64(0)
                 : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}
template <> __device__ __forceinline__ void wgmma<192>(float (&d)[96], uint64_t a, uint64_t b, bool accumulate) {
    asm volatile("{.reg .pred p; setp.ne.b32 p, %98, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
                 "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
                 "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
                 "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,"
                 "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
                 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95}, %96, %97, p, 1, 1, 0, 0;}"
                 : FM_R64(0), FM_R32(64)
                 : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)));
}
#undef FM_R4
#undef FM_R16
#undef FM_R32
#undef FM_R64

// Sets the registers per thread of a warpgroup. All of its warps call it.
template <int R> __device__ __forceinline__ void registers_increase() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(R));
}
template <int R> __device__ __forceinline__ void registers_decrease() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(R));
}

__device__ __forceinline__ void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

#endif // __CUDACC__
#endif // FM_EMULATE

} // namespace fm::cuda::sm90
