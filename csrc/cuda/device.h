// What the host must know of a CUDA device. Nothing here needs a driver to be present.
#pragma once

#include <stdint.h>

#include <string>

namespace fused_losses {

// Why device `index` can't run these kernels, with the fix, or "".
std::string unusable(int index);

struct DeviceLimits {
    int multiprocessors;
    int64_t l2_bytes;
};

// Of the current device. Asked once per device and kept: later calls, under CUDA-graph capture too, only read.
DeviceLimits device_limits();

}  // namespace fused_losses
