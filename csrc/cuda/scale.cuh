// A finished gradient times the upstream gradient.
#pragma once

#include "row.cuh"

namespace fused_losses {

// The scale is read on the device: the host never waits for it, and with 1 no gradient is touched.
template <class T>
__global__ void __launch_bounds__(kMaxThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
    const float scale = *p.scale;
    if (scale == 1.f) return;
    for (int64_t row = blockIdx.x; row < p.grad.n; row += gridDim.x) {
        T* grad = row_pointer<T>(p.grad, row);
        // Zeros stay: the gradient of a masked token is 0 for an infinite scale, too.
        map_row(grad, grad, static_cast<int>(p.grad.vocab), [=](float x) { return x == 0.f ? x : x * scale; });
    }
}

}  // namespace fused_losses
