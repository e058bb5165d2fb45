// The CUDA runtime for the kernels or, under FM_EMULATE, fibers on the host.
#pragma once

#ifdef FM_EMULATE
#include "emulation.h"
#define FM_UNROLL
#else

#include <cuda_runtime.h>

#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#define FM_UNROLL _Pragma("unroll")

namespace fm::cuda {

inline void check(cudaError_t error, const char* operation) {
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("fused_margin: ") + operation + ": " + cudaGetErrorString(error));
}

// The configuration of a launch. Blocks of one cluster run at the same time and access each other's shared memory. A
// cluster size of 1 launches without the cluster attribute.
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
    LaunchConfig(const LaunchConfig&) = delete; // config points to a member
};

// Permits runtime calls that load a kernel while this thread captures a graph.
struct RelaxedCapture {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    RelaxedCapture() { check(cudaThreadExchangeStreamCaptureMode(&mode), "capture mode"); }
    ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode); }
    RelaxedCapture(const RelaxedCapture&) = delete;
};

// A CUDA graph can capture a call: the launch is its only operation on a stream, nothing before it allocates or waits,
// and kernels receive parameters and tensor maps by value.
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

// Allows a kernel to use dynamic shared memory up to `most_bytes`, the size of its largest launch, once for each
// device. If each launch set its own size, another host thread could set a smaller one between the setting and the
// launch.
template <class... A> void allow_shared_memory(void (*kernel)(A...), int most_bytes) {
    static std::mutex mutex;
    static std::set<std::pair<int, void (*)(A...)>> allowed;
    std::lock_guard<std::mutex> lock(mutex);
    std::pair<int, void (*)(A...)> key(current_device(), kernel);
    if (allowed.count(key)) return;
    RelaxedCapture relaxed;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes), "shared memory");
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
          "shared memory carve-out");
    allowed.insert(key);
}

// The number of clusters that the current device runs at a time. Queried once for each launch configuration.
template <class... A> int resident_clusters(void (*kernel)(A...), int cluster_size, int threads, int shared_bytes) {
    static std::mutex mutex;
    static std::map<std::tuple<int, void (*)(A...), int, int, int>, int> known;
    std::lock_guard<std::mutex> lock(mutex);
    int& count = known[{current_device(), kernel, cluster_size, threads, shared_bytes}];
    if (count == 0) {
        RelaxedCapture relaxed;
        LaunchConfig launch(multiprocessors() / cluster_size, cluster_size, threads, shared_bytes, nullptr);
        launch.config.numAttrs = 1;
        check(cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config), "occupancy");
        if (count == 0) throw std::runtime_error("fused_margin: this device has no room for a kernel's cluster");
    }
    return count;
}

#ifdef __CUDACC__

// 2^x with an error of at most two units in the last place; flushes denormals
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

// Loads value, an array of 4, 8 or 16 bytes, in one instruction. The address is aligned to its size.
template <class Value> __device__ __forceinline__ void load_aligned(const void* from, Value& value) {
    static_assert(sizeof value == 4 || sizeof value == 8 || sizeof value == 16);
    using Words = std::conditional_t<sizeof value == 16, uint4, std::conditional_t<sizeof value == 8, uint2, uint32_t>>;
    Words words = *static_cast<const Words*>(from);
    memcpy(&value, &words, sizeof value);
}
template <class Value> __device__ __forceinline__ void store_16_bytes(void* to, const Value& value) {
    static_assert(sizeof value == 16);
    uint32_t words[4];
    memcpy(words, &value, sizeof words);
    // in assembly, because the compiler sometimes splits the store of a uint4 into four
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                 "r"(words[1]), "r"(words[2]), "r"(words[3])
                 : "memory");
}
// Stores value, an array of 4, 8 or 16 bytes, in one instruction. The address is aligned to its size.
template <class Value> __device__ __forceinline__ void store_aligned(void* to, const Value& value) {
    static_assert(sizeof value == 4 || sizeof value == 8 || sizeof value == 16);
    if constexpr (sizeof value == 16) {
        store_16_bytes(to, value);
    } else {
        uint32_t words[sizeof value / 4];
        memcpy(words, &value, sizeof words);
        if constexpr (sizeof value == 8)
            asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(words[0]),
                         "r"(words[1])
                         : "memory");
        else
            *static_cast<uint32_t*>(to) = words[0];
    }
}

#endif

} // namespace fm::cuda

#endif
