// A CUDA runtime that launches nothing and records the calls of the host code in csrc/cuda/device.h.
#pragma once

#include <mutex>
#include <string>
#include <utility>
#include <vector>

enum cudaError_t { cudaSuccess, cudaErrorFake };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal, cudaStreamCaptureModeRelaxed };
constexpr int cudaSharedmemCarveoutMaxShared = 100;
using cudaStream_t = void*;

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3() = default;
    explicit dim3(unsigned x) : x(x) {}
};
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace runtime {

struct Call {
    std::string name;
    int device;
    const void* kernel;
    int64_t value; // of an attribute; blocks of a launch
    int shared_bytes, cluster;
    void* stream;
};
inline std::vector<Call> calls;
inline std::mutex mutex;
inline thread_local int device = 0;
inline thread_local cudaStreamCaptureMode capture_mode = cudaStreamCaptureModeGlobal;
inline bool loaded_in_capture = false; // a call that may load a kernel was made without the relaxed mode
inline cudaError_t next_launch = cudaSuccess;

inline cudaError_t record(const Call& call) {
    std::lock_guard<std::mutex> lock(mutex);
    calls.push_back(call);
    return cudaSuccess;
}

inline void note_load() {
    std::lock_guard<std::mutex> lock(mutex);
    loaded_in_capture |= capture_mode != cudaStreamCaptureModeRelaxed;
}

} // namespace runtime

inline const char* cudaGetErrorString(cudaError_t) { return "a fake error"; }
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, runtime::capture_mode);
    return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = runtime::device, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int device) {
    *value = 100 + device;
    return cudaSuccess;
}
template <class K> cudaError_t cudaFuncSetAttribute(K* kernel, cudaFuncAttribute attribute, int value) {
    runtime::note_load();
    bool size = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize;
    return runtime::record(
        {size ? "allow" : "carve-out", runtime::device, reinterpret_cast<const void*>(kernel), value, 0, 0, nullptr});
}
template <class K> cudaError_t cudaOccupancyMaxActiveClusters(int* count, K* kernel, const cudaLaunchConfig_t* config) {
    runtime::note_load();
    *count = static_cast<int>(config->gridDim.x / config->attrs->val.clusterDim.x);
    return runtime::record({"occupancy", runtime::device, reinterpret_cast<const void*>(kernel), *count,
                            static_cast<int>(config->dynamicSmemBytes),
                            static_cast<int>(config->attrs->val.clusterDim.x), config->stream});
}
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...), const A&...) {
    runtime::record({"launch", runtime::device, reinterpret_cast<const void*>(kernel), config->gridDim.x,
                     static_cast<int>(config->dynamicSmemBytes),
                     config->numAttrs ? static_cast<int>(config->attrs->val.clusterDim.x) : 0, config->stream});
    return runtime::next_launch;
}
