// The device code as a Python module: the five functions of the real ones, on CPU memory.
#include "../../csrc/bindings.h"
#include "../../csrc/cuda/device.h"

namespace host_cuda {
bool descending = false;  // of host_cuda.h, which sees other flags than this file does and is not for it
}

namespace {
fused_losses::DeviceLimits limits{2, 1 << 20};
}

fused_losses::DeviceLimits fused_losses::device_limits() { return limits; }

PYBIND11_MODULE(_host_cuda, m) {
    fused_losses::bindings::bind(m);
    m.def("configure", [](int multiprocessors, int64_t l2_bytes, bool descending) {
        limits = {multiprocessors, l2_bytes};
        host_cuda::descending = descending;
    });
}
