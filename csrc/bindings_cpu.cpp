#include <pybind11/stl.h>

#include "bindings.h"
#include "build.h"
#include "cpu/instruction_sets.h"

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fused_losses CPU kernels; use them through fused_losses.";
    fused_losses::bindings::bind(m, fused_losses::dlpack::kCpu);
    m.attr("build") = fused_losses::bindings::build();
    m.def("instruction_sets", &fused_losses::cpu::instruction_sets, "That run here, the best first.");
    m.def("use_instruction_set", &fused_losses::cpu::use_instruction_set, "From now on, by all threads.");
    m.def("instruction_set_in_use", &fused_losses::cpu::instruction_set_in_use);
}
