// What the host must know of a CUDA device. Nothing here needs a driver to be present.
#pragma once

#include <stdint.h>

#include <string>

namespace fused_losses {

// Why device `index` can't run these kernels, with the fix, or "".
std::string unusable(int index);

std::string cuda_version();  // that these kernels were built with

struct DeviceLimits {
    int multiprocessors;
    int64_t l2_bytes;
    int64_t shared_bytes;  // that a block may have of the kernels that ask for more than usual; 0: they can't run here
    int64_t shared_bytes_of_multiprocessor;
    bool clusters;  // whether two blocks can be launched to share their shared memory
};

// Of the current device. Asked once per device and kept: later calls, under CUDA-graph capture too, only read.
DeviceLimits device_limits();

// Lets a block of those kernels have so much, on the current device; what went wrong, or "". It also loads them, which
// else happens at their first launch, maybe in a capture. By launch.cu, which has the kernels.
std::string allow_shared(int64_t bytes);

}  // namespace fused_losses
