#include "bindings.h"

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fused_losses CPU kernels; use them through fused_losses.";
    fused_losses::bindings::bind(m);
}
