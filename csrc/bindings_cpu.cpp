#include <string>
#include <vector>

#include "bindings.h"

namespace fused_losses {
namespace cpu {
std::vector<std::string> instruction_sets();        // that run here, the best first, which is in use
void use_instruction_set(const std::string& name);  // from now on, by all threads: for tests
}  // namespace cpu
}  // namespace fused_losses

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "fused_losses CPU kernels; use them through fused_losses.";
    fused_losses::bindings::bind(m);
    m.def("instruction_sets", &fused_losses::cpu::instruction_sets);
    m.def("use_instruction_set", &fused_losses::cpu::use_instruction_set);
}
