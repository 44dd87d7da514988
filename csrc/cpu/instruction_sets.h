// Which compilation of vocab.cpp runs.
#pragma once

#include <string>
#include <vector>

#include "vocab.h"

namespace fused_losses {
namespace cpu {

std::vector<std::string> instruction_sets();  // that run here, the best first, which is in use at first
std::string instruction_set_in_use();
void use_instruction_set(const std::string& name);  // from now on, by all threads

const VocabFunctions& vocab_functions();

}  // namespace cpu
}  // namespace fused_losses
