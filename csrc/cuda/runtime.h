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

// together: blocks of a cluster; 1: no clusters.
template <class Params>
void start(void (*kernel)(Params), int64_t blocks, int threads, size_t shared_bytes, uintptr_t stream, Params params,
           int together = 1) {
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = static_cast<unsigned>(together);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = reinterpret_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = together > 1 ? 1 : 0;
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, params);
    if (error != cudaSuccess)
        throw std::runtime_error("fused_losses: a CUDA kernel could not be launched: " + why(error));
}

}  // namespace fused_losses
