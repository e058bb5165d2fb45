// The CUDA backend: the kernels of the CPU backend, launched on the caller's stream and the current device.
#pragma once

#include "../kernels/all.h"

namespace fm::cuda {

// stream is a cudaStream_t. Throws std::runtime_error when a launch is refused.
#define FM_DECLARE(P) void run(const P&, void* stream);
FM_ALL_KERNELS(FM_DECLARE)
#undef FM_DECLARE

} // namespace fm::cuda
