// Stage 3 alone: the gradient from the stats and a coefficient per row.
#pragma once

#include "terms.cuh"

namespace fused_losses {

// coefficient * upstream, where either being 0 makes the row 0 whatever the other holds. A target outside [0, V) makes
// the row NaN even if the coefficient, which need not come from these objectives, is a number. ignore_index plays no
// part: an ignored token has coefficient 0.
__device__ __forceinline__ float upstream_coefficient(const GradParams& p, int64_t row, int target) {
    const float coefficient = p.coefficients.at(row), upstream = p.upstream.at(row);
    if (coefficient == 0.f || upstream == 0.f) return 0.f;
    return target >= 0 ? coefficient * upstream : NAN;
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads) grad_kernel(const __grid_constant__ GradParams p) {
    const int vocab = static_cast<int>(p.vocab);
    const int64_t n = p.logits.n;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        const int target = target_index(p.targets, row, vocab);
        const RowStats stats = {p.stats[row], p.stats[n + row], p.stats[2 * n + row]};
        write_gradient(row_pointer<T>(p.logits, row), row_pointer<T>(p.grad, row), vocab, target,
                       upstream_coefficient(p, row, target), inverse_temperature(p.temperature, row), stats);
    }
}

template <class T, class Z>
__global__ void __launch_bounds__(Z::kThreads, 1) terms_grad_kernel(const __grid_constant__ WithTerms<GradParams> p) {
    BlockReduce<TargetSums> block_reduce(shared_memory<BlockReduce<TargetSums>::Shared>());
    const GradParams& plain = p.plain;
    const int64_t n = plain.logits.n;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        const RowTargets targets(plain.targets, p.terms, plain.stats + 2 * n, row, n);
        const float inverse_t = inverse_temperature(plain.temperature, row), upstream = plain.upstream.at(row);
        const auto coefficient = [&](int i) { return times(plain.coefficients.data[i * n + row], upstream); };
        Coefficients by = {coefficient(0), coefficient(1), coefficient(2), coefficient(3)};
        const TermsStats<Z> stats = read_terms_stats(plain.stats, targets, Z::of(p.terms.softcap, inverse_t));
        const float first = targets.logit(0);
        TargetSums sums;
        if (!by.none()) sums = sum_targets(targets, first, stats, block_reduce);
        if (sums.logp != sums.logp) by.g = NAN;  // even if the coefficients, which may come from elsewhere, are numbers
        write_terms_gradient(row_pointer<T>(plain.logits, row), row_pointer<T>(plain.grad, row),
                             static_cast<int>(plain.vocab), targets, first, sums.total, by, inverse_t, stats);
    }
}

}  // namespace fused_losses
