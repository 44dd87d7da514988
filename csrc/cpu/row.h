// What plain_row.h and terms_row.h share: the functions of the instruction set in use, and where a row keeps what it
// needs again.
#pragma once

#include <type_traits>
#include <vector>

#include "../loss.h"
#include "instruction_sets.h"

namespace fused_losses {
namespace cpu {

constexpr float kLog2e = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

template <class T>
const RowFunctions<T>& functions();
template <>
inline const RowFunctions<float>& functions() {
    return vocab_functions().float32;
}
template <>
inline const RowFunctions<BFloat16>& functions() {
    return vocab_functions().bfloat16;
}
template <>
inline const RowFunctions<Float16>& functions() {
    return vocab_functions().float16;
}

// On a boundary of cache lines: a vector that crosses one is stored, and loaded, twice.
inline float* scratch_row(int64_t vocab) {
    constexpr size_t kLine = 64 / sizeof(float);
    static thread_local std::vector<float> scratch;
    const size_t size = static_cast<size_t>(vocab) + kWhole + kLine;
    if (scratch.size() < size) scratch.resize(size);
    const size_t past = reinterpret_cast<uintptr_t>(scratch.data()) / sizeof(float) % kLine;
    return scratch.data() + (kLine - past) % kLine;
}

inline float* references_of(int64_t vocab) {
    static thread_local std::vector<float> references;
    references.resize((vocab + kBlock - 1) / kBlock * kReferences);
    return references.data();
}

constexpr Kept kNothing = {nullptr, nullptr, true};

// Where to keep the exponentials of a row. float32 has the gradient's own row for them, where that may be the logits'
// own; which does not do if the logits are needed again.
template <class T>
Kept kept_exponentials(const T* logits, T* grad, int64_t vocab, bool logits_again) {
    const bool own = static_cast<const void*>(grad) != logits;
    if (std::is_same<T, float>::value && (own || !logits_again))
        return {reinterpret_cast<float*>(grad), references_of(vocab), !own};
    return {scratch_row(vocab), references_of(vocab), true};
}

template <class T>
float target_logit(const T* logits, int64_t target, int64_t vocab) {
    return target >= 0 && target < vocab ? functions<T>().load(logits + target) : NAN;
}

template <class T>
void store_target(T* grad, int64_t target, int64_t vocab, float value) {
    if (target >= 0 && target < vocab) functions<T>().store(grad + target, value);
}

}  // namespace cpu
}  // namespace fused_losses
