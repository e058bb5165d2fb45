// What the kernels take from CUDA: the runtime itself, or, under FM_EMULATE, fibers on the host.
#pragma once

#ifdef FM_EMULATE
#include "emulation.h"
#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace fm::cuda {

template <class P> void launch(void (*kernel)(P), int64_t blocks, int threads, void* stream, const P& params) {
    if (blocks == 0) return;
    if (blocks > 0x7fffffff) throw std::runtime_error("fused_margin: more rows than one CUDA launch can take");
    kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(params);
    cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess)
        throw std::runtime_error(std::string("fused_margin: CUDA launch failed: ") + cudaGetErrorString(error));
}

} // namespace fm::cuda

#endif
