// What softmax.cuh is to a plain loss: the numbers that a loss with terms sees of a row, and the gradient that its four
// coefficients send back. Which terms a loss has is not known here, only whether the logits are capped (Z).
#pragma once

#include "softmax.cuh"

namespace fused_losses {

template <class Params>
struct WithTerms {
    Params plain;
    Terms terms;
};

// Of rows that were not read: 0, 1, 0, 0, which give logp 0 and entropy 0 where the temperature is bad, too.
template <class Z>
struct TermsStats {
    Z z;
    float max = 0.f;     // of the raw logits; -FLT_MAX where all are -inf
    float sum = 1.f;     // sum_j exp(z_j - z_max)
    float moment = 0.f;  // sum_j exp(z_j - z_max) (z_j - z_max)
    float mean = 0.f;    // mean_j z_j - z_max

    // z - z_max. Equal levels are set apart, as in RowStats.
    __device__ __forceinline__ float distance(float logit) const {
        const float levels = z.level(logit) - z.level(max);
        return levels == 0.f ? 0.f : levels * z.scale;
    }
    __device__ __forceinline__ float logprob(float logit) const { return distance(logit) - logf(sum); }
    __device__ __forceinline__ float entropy() const { return logf(sum) - moment / sum; }
};

// The targets of one row. Several are dealt out, target k to thread k modulo blockDim.x: what it keeps for a target
// only that thread reads.
struct RowTargets {
    const Targets& targets;
    const Terms& terms;
    int64_t row, n;
    const float* logits;  // (K, N), from this row on

    __device__ __forceinline__ RowTargets(const Targets& targets, const Terms& terms, const float* logits, int64_t row,
                                          int64_t n)
        : targets(targets), terms(terms), row(row), n(n), logits(logits + row) {}

    __device__ __forceinline__ int num() const { return static_cast<int>(targets.num); }
    __device__ __forceinline__ int index(int k, int vocab) const {
        return target_index(targets, row * targets.num + k, vocab);
    }
    __device__ __forceinline__ bool ignored(int k) const { return targets.at(row, k) == targets.ignore_index; }
    __device__ __forceinline__ float share(int k) const { return terms.share(row * targets.num + k); }
    __device__ __forceinline__ float logit(int k) const { return logits[k * n]; }
};

// NaN for a target outside [0, V)
template <class T>
__device__ __forceinline__ float target_logit(const T* logits, int vocab, const RowTargets& targets, int k) {
    const int target = targets.index(k, vocab);
    return target >= 0 ? to_float(logits[target]) : NAN;
}

// Over the targets that count, which are those whose share is not 0.
struct TargetSums {
    float logp = 0.f;   // x = sum_k share_k logp_k; NaN if one of them is outside [0, V)
    float total = 0.f;  // U = sum_k share_k

    __device__ __forceinline__ void add(float share, float logprob) {
        if (share == 0.f) return;
        logp += share * logprob;
        total += share;
    }
};

__device__ __forceinline__ TargetSums warp_sum(const TargetSums& x) { return {warp_sum(x.logp), warp_sum(x.total)}; }

// The same for all threads of the block. first: the logit of the first target.
template <class Z>
__device__ __forceinline__ TargetSums sum_targets(const RowTargets& targets, float first, const TermsStats<Z>& stats,
                                                  BlockReduce<TargetSums>& block_reduce) {
    TargetSums sums;
    if (targets.num() == 1) {
        sums.add(targets.share(0), stats.logprob(first));
        return sums;
    }
    for (int k = threadIdx.x; k < targets.num(); k += blockDim.x)
        sums.add(targets.share(k), stats.logprob(targets.logit(k)));
    return block_reduce(sums, TargetSums{}, [](const TargetSums& x) { return warp_sum(x); });
}

// The same for all threads of the block; the targets' logits, which a gradient in place overwrites, must be read
// before.
template <class T, class Z>
__device__ __forceinline__ TermsStats<Z> terms_stats(const T* logits, int vocab, const Z& z,
                                                     BlockReduce<Online<Moments>>& block_reduce) {
    const Online<Moments> all = block_reduce(sum_row<Moments>(logits, vocab, z), Online<Moments>{},
                                             [&](const Online<Moments>& x) { return warp_sum(x, z); });
    return {z, all.max, all.sums.sum, all.sums.moment * kLn2, all.sums.linear * z.scale / static_cast<float>(vocab)};
}

template <class Z>
__device__ __forceinline__ TermsStats<Z> read_terms_stats(const float* stats, const RowTargets& targets, const Z& z) {
    const int k = targets.num();
    return {z, stats[targets.row], stats[targets.n + targets.row], targets.logit(k), targets.logit(k + 1)};
}

template <class Z>
__device__ __forceinline__ RowSeen seen(const TermsStats<Z>& stats, const TargetSums& sums) {
    const float log_sum = logf(stats.sum);
    return {sums.logp, sums.total, stats.z.level(stats.max) * stats.z.scale + log_sum, stats.entropy(),
            log_sum - stats.mean};
}

// grad_j = dz_j/dlogits_j (g (share_j - U p_j) + p_j (zeta - h (d_j - moment / sum)) + s / V), where d_j = z_j - z_max
// and share_j is the sum of the shares of the targets that are j. grad may be logits, which are not read if no
// coefficient is there to be sent back: select, as 0 * NaN is not 0.
template <class T, class Z>
__device__ __forceinline__ void write_terms_gradient(const T* logits, T* grad, int vocab, const RowTargets& targets,
                                                     float first, float total, const Coefficients& by,
                                                     float inverse_temperature, const TermsStats<Z>& stats) {
    if (by.none()) return zero_row(grad, vocab);
    const Z z = stats.z;
    const float top = z.level(stats.max), mean_distance = stats.moment / stats.sum;
    const float flat = by.s / static_cast<float>(vocab), factor = inverse_temperature / stats.sum;
    // All elements as if they were no target's: e_j (constant + slope exponent_j) + uniform.
    const float constant = factor * (by.zeta - by.g * total + by.h * mean_distance), slope = factor * by.h * -kLn2;
    const float uniform = inverse_temperature * flat;
    const Span<T> span = map_row(logits, grad, vocab, [=](float x) {
        const float level = z.level(x), exponent = fmaxf(z.exponent(level - top), kLowestExponent);
        return (exp2_approx(exponent) * (slope * exponent + constant) + uniform) * z.slope(level);
    });
    // Then the targets' elements, again and whole, in float32: 1 - p is lost in bfloat16 when p is near 1.
    const auto element = [&](float logit, float share) {
        const float distance = fmaxf(stats.distance(logit), kLowestExponent), p = expf(stats.logprob(logit));
        const float by_z = by.g * (share - total * p) + p * (by.zeta - by.h * (distance - mean_distance)) + flat;
        return inverse_temperature * z.slope(z.level(logit)) * by_z;
    };
    if (targets.num() == 1) {
        const int target = targets.index(0, vocab);
        if (target >= 0 && static_cast<int>(threadIdx.x) == span.owner(target))
            assign(grad[target], element(first, targets.share(0)));
        return;
    }
    __syncthreads();  // else the thread that owns the element may write it after this one
    for (int k = threadIdx.x; k < targets.num(); k += blockDim.x) {
        const int target = targets.index(k, vocab);
        if (target < 0 || targets.share(k) == 0.f) continue;
        float share = 0.f;
#pragma unroll 4
        for (int i = 0; i < targets.num(); ++i)
            if (targets.index(i, vocab) == target) share += targets.share(i);
        assign(grad[target], element(targets.logit(k), share));  // of a target that is there twice: the same bits twice
    }
}

}  // namespace fused_losses
