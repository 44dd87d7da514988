#include "bindings.h"
#include "build.h"
#include "cuda/device.h"

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "fused_losses CUDA kernels; use them through fused_losses.";
    fused_losses::bindings::bind(m, fused_losses::dlpack::kCuda);
    m.def("unusable", &fused_losses::unusable, "Why device `index` can't run these kernels, or ''.");
    m.attr("architectures") = FL_CUDA_ARCHITECTURES;
    pybind11::dict build = fused_losses::bindings::build();
    build["cuda"] = fused_losses::cuda_version();
    m.attr("build") = build;
}
