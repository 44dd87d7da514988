#include "instruction_sets.h"

#include <atomic>
#include <stdexcept>

namespace fused_losses {
namespace cpu {
namespace {

struct InstructionSet {
    const char* name;
    bool usable;
    const VocabFunctions* functions;
};

// The best first. The last runs anywhere.
const std::vector<InstructionSet>& all() {
    static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
        {"avx512",
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
         &vocab_avx512},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &vocab_avx2},
#endif
        {"baseline", true, &vocab_baseline},
    };
    return sets;
}

const InstructionSet* best() {
    for (const InstructionSet& set : all())
        if (set.usable) return &set;
    return nullptr;
}

std::atomic<const InstructionSet*>& in_use() {
    static std::atomic<const InstructionSet*> set{best()};
    return set;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& set : all())
        if (set.usable) names.push_back(set.name);
    return names;
}

std::string instruction_set_in_use() { return in_use().load()->name; }

void use_instruction_set(const std::string& name) {
    for (const InstructionSet& set : all()) {
        if (!set.usable || name != set.name) continue;
        in_use() = &set;
        return;
    }
    throw std::invalid_argument("instruction set " + name + " does not exist or does not run here");
}

const VocabFunctions& vocab_functions() { return *in_use().load(std::memory_order_relaxed)->functions; }

}  // namespace cpu
}  // namespace fused_losses
