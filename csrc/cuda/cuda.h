// The CUDA backend: the same kernels, launched on the caller's stream and current device.
#pragma once

#include "../cpu/cpu.h"

namespace fm::cuda {

// stream is a cudaStream_t. Throws std::runtime_error when a launch is refused.
#define FM_DECLARE(P) void run(const P&, void* stream);
FM_ALL_KERNELS(FM_DECLARE)
#undef FM_DECLARE

} // namespace fm::cuda
