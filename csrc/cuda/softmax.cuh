// A row's softmax in the three numbers a loss sees of it, and the gradient a coefficient sends back. No loss is known
// here; the kernels are combinations of these two.
#pragma once

#include "../row.h"
#include "block.cuh"

namespace fused_losses {

template <class T>
__device__ __forceinline__ T* row_pointer(const Rows& rows, int64_t row) {
    return static_cast<T*>(rows.data) + rows.offset(row);
}

struct RowStats {
    float max;     // of the raw logits; -FLT_MAX where all are -inf
    float sum;     // sum_j exp((logits_j - max) / temperature)
    float target;  // the target's logit, NaN if the target is outside [0, V)

    // In natural units, as the loss is. target == max is set apart for rows that were not read (0, 1, 0), which must
    // give 0 where the temperature is bad, too; a row that was read shows a bad temperature in its sum.
    __device__ __forceinline__ float logprob(float inverse_temperature) const {
        const float distance = target - max;
        return (distance == 0.f ? 0.f : distance * inverse_temperature) - logf(sum);
    }
};

// The logits of a token of weight 0 are read only for its logprob, those of an ignored token never.
__device__ __forceinline__ bool reads_logits(const Targets& targets, const Column& weights, bool all_logprobs,
                                             int64_t row) {
    return !targets.ignored(row) && (all_logprobs || weights.at(row) != 0.f);
}

// Target i = row * K + k, or -1 if it is outside [0, V).
__device__ __forceinline__ int target_index(const Targets& targets, int64_t i, int vocab) {
    const int64_t target = targets.at(i);
    return 0 <= target && target < vocab ? static_cast<int>(target) : -1;
}

// The same for all threads of the block. target: from target_index.
template <class T>
__device__ __forceinline__ RowStats row_stats(const T* logits, int vocab, int target, float inverse_temperature,
                                              BlockReduce<Online<Sum>>& block_reduce) {
    const Identity z{inverse_temperature};
    // Before the barrier in block_reduce, as in place the sweep after it overwrites the target's logit.
    const float target_logit = target >= 0 ? to_float(logits[target]) : NAN;
    const Online<Sum> all = block_reduce(sum_row<Sum>(logits, vocab, z), Online<Sum>{},
                                         [z](const Online<Sum>& x) { return warp_sum(x, z); });
    return {all.max, all.sums.sum, target_logit};
}

// grad_j = coefficient / temperature * ([j == target] - p_j), with p_j = 2^((logits_j - max) c) / sum.
// grad may be logits. Logits are not read where the coefficient is 0: select, as 0 * NaN is not 0.
template <class T>
__device__ __forceinline__ void write_gradient(const T* logits, T* grad, int vocab, int target, float coefficient,
                                               float inverse_temperature, const RowStats& stats) {
    if (coefficient == 0.f) return zero_row(grad, vocab);
    const float max = stats.max, c = kLog2e * inverse_temperature, slope = coefficient * inverse_temperature;
    const float factor = -slope / stats.sum;  // one division per row, none per element
    const Span<T> span = map_row(logits, grad, vocab, [=](float x) { return factor * exp2_approx((x - max) * c); });
    // No comparison per element: the thread that has just written the target's element writes it again, formed in
    // float32, as 1 - p is lost in bfloat16 when p is near 1.
    if (target >= 0 && static_cast<int>(threadIdx.x) == span.owner(target))
        assign(grad[target], slope * (1.f - exp2_approx((stats.target - max) * c) / stats.sum));
}

}  // namespace fused_losses
