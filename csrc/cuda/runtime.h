// The launch itself, and what is asked of the CUDA runtime beside it. tests/host_cuda runs all of it against a runtime
// of its own.
#pragma once

#include <stdint.h>

#include <stdexcept>
#include <string>

#if !defined(__CUDACC__)
#include "host_runtime.h"
#endif

namespace fused_losses {

// Names an error, and takes it back: else the next one who asks would take it for his own.
inline std::string why(cudaError_t error) {
    cudaGetLastError();
    return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

template <class Params>
void start(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, uintptr_t stream, Params params) {
    void* arguments[] = {&params};
    const cudaError_t error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments,
                                               shared_bytes, reinterpret_cast<cudaStream_t>(stream));
    if (error != cudaSuccess)
        throw std::runtime_error("fused_losses: a CUDA kernel could not be launched: " + why(error));
}

}  // namespace fused_losses
