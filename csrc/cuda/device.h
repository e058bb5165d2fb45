// What the kernels take from CUDA: the runtime itself, or, under FM_EMULATE, fibers on the host.
#pragma once

#ifdef FM_EMULATE
#include "emulation.h"
#define FM_UNROLL
#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#define FM_UNROLL _Pragma("unroll")

namespace fm::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("fused_margin: ") + what + ": " + cudaGetErrorString(error));
}

template <class P> void launch(void (*kernel)(P), int64_t blocks, int threads, void* stream, const P& params) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("fused_margin: more rows than one CUDA launch can take");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    check(cudaGetLastError(), "CUDA launch failed");
}

// Blocks of one cluster run at the same time and reach each other's shared memory. Size 1 asks for none.
struct ClusterLaunch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute cluster{};

    ClusterLaunch(int clusters, int cluster_size, int threads, int shared_bytes, void* stream) {
        config.gridDim = dim3(static_cast<unsigned>(clusters * cluster_size));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
        config.stream = static_cast<cudaStream_t>(stream);
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {static_cast<unsigned>(cluster_size), 1, 1};
        config.attrs = &cluster;
        config.numAttrs = cluster_size > 1 ? 1 : 0;
    }
    ClusterLaunch(const ClusterLaunch&) = delete; // config points into this
};

template <class... A> void launch_cluster(void (*kernel)(A...), int clusters, int cluster_size, int threads,
                                          int shared_bytes, void* stream, const A&... arguments) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
    ClusterLaunch launch(clusters, cluster_size, threads, shared_bytes, stream);
    check(cudaLaunchKernelEx(&launch.config, kernel, arguments...), "CUDA launch failed");
}

inline int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "current device");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
    return count;
}

// Clusters of these blocks that the current device runs at a time. Asked once for each way to launch.
template <class... A> int resident_clusters(void (*kernel)(A...), int cluster_size, int threads, int shared_bytes) {
    static std::mutex mutex;
    static std::map<std::tuple<int, void (*)(A...), int, int>, int> known;
    int device = 0;
    check(cudaGetDevice(&device), "current device");
    std::lock_guard<std::mutex> lock(mutex);
    int& count = known[{device, kernel, cluster_size, shared_bytes}];
    if (count == 0) {
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes), "shared memory");
        ClusterLaunch launch(multiprocessors() / cluster_size, cluster_size, threads, shared_bytes, nullptr);
        launch.config.numAttrs = 1;
        check(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config), "occupancy");
        if (count == 0) throw std::runtime_error("fused_margin: this device has no room for a kernel's cluster");
    }
    return count;
}

#ifdef __CUDACC__

// 2^x, two units in the last place; flushes denormals
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Two floats as fp16, `low` in the low half
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}
__device__ __forceinline__ float low_half(uint32_t word) {
    float value;
    asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(word));
    return value;
}
__device__ __forceinline__ float high_half(uint32_t word) { return low_half(word >> 16); }

__device__ __forceinline__ void store_16_bytes(uint16_t* to, const uint32_t (&words)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(words[0], words[1], words[2], words[3]);
}

#endif

} // namespace fm::cuda

#endif
