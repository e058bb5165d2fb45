// What the kernels take from CUDA: the runtime itself, or, under FM_EMULATE, fibers on the host.
#pragma once

#ifdef FM_EMULATE
#include "emulation.h"
#define FM_UNROLL
#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#define FM_UNROLL _Pragma("unroll")

namespace fm::cuda {

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("fused_margin: ") + what + ": " + cudaGetErrorString(error));
}

// How blocks are launched. Blocks of one cluster run at the same time and reach each other's shared memory; a size of 1
// launches without the cluster attribute.
struct LaunchConfig {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute cluster{};

    LaunchConfig(int64_t clusters, int cluster_size, int threads, int shared_bytes, void* stream) {
        if (clusters > 0x7fffffff / cluster_size)
            throw std::runtime_error("fused_margin: more rows than one CUDA launch can take");
        config.gridDim = dim3(static_cast<unsigned>(clusters * cluster_size));
        config.blockDim = dim3(static_cast<unsigned>(threads));
        config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
        config.stream = static_cast<cudaStream_t>(stream);
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = static_cast<unsigned>(cluster_size);
        cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
        config.attrs = &cluster;
        config.numAttrs = cluster_size > 1 ? 1 : 0;
    }
    LaunchConfig(const LaunchConfig&) = delete; // config points into this
};

// A launch is all that happens on the stream. Nothing that precedes it there allocates, waits or touches a stream, so
// that calls may be captured in a CUDA graph, tensor maps and parameters by value.
template <class... A> void launch_cluster(void (*kernel)(A...), int64_t clusters, int cluster_size, int threads,
                                          int shared_bytes, void* stream, const A&... arguments) {
    LaunchConfig launch(clusters, cluster_size, threads, shared_bytes, stream);
    check(cudaLaunchKernelEx(&launch.config, kernel, arguments...), "CUDA launch failed");
}

template <class P> void launch(void (*kernel)(P), int64_t blocks, int threads, void* stream, const P& params) {
    if (blocks > 0) launch_cluster(kernel, blocks, 1, threads, 0, stream, params);
}

inline int current_device() {
    int device = 0;
    check(cudaGetDevice(&device), "current device");
    return device;
}

inline int multiprocessors() {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current_device()), "multiprocessors");
    return count;
}

// Lets a kernel have dynamic shared memory up to `most_bytes`, its largest launch. Once for each device: set anew for
// every launch, a smaller value of another host thread could come between a larger one and its launch.
template <class... A> void allow_shared_memory(void (*kernel)(A...), int most_bytes) {
    static std::mutex mutex;
    static std::set<std::pair<int, void (*)(A...)>> allowed;
    std::lock_guard<std::mutex> lock(mutex);
    std::pair<int, void (*)(A...)> key(current_device(), kernel);
    if (allowed.count(key)) return;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes), "shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "shared memory carve-out");
    allowed.insert(key);
}

// Clusters of these blocks that the current device runs at a time. Asked once for each way to launch.
template <class... A> int resident_clusters(void (*kernel)(A...), int cluster_size, int threads, int shared_bytes) {
    static std::mutex mutex;
    static std::map<std::tuple<int, void (*)(A...), int, int>, int> known;
    std::lock_guard<std::mutex> lock(mutex);
    int& count = known[{current_device(), kernel, cluster_size, shared_bytes}];
    if (count == 0) {
        LaunchConfig launch(multiprocessors() / cluster_size, cluster_size, threads, shared_bytes, nullptr);
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
