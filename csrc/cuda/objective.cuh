// The N-sized kernels: the objective alone, the normaliser before it, the reduction after it.
#pragma once

#include "terms.cuh"

namespace fused_losses {

// Without a reduction it is 1, which the first thread writes.
__device__ __forceinline__ float denominator_in_use(const ObjectiveParams& p, int64_t thread) {
    if (!p.loss && thread == 0) p.row_losses[p.n] = 1.f;
    return !p.loss ? 1.f : p.mean ? p.row_losses[p.n] : p.denominator.at(0);
}

__global__ void __launch_bounds__(kMaxThreads) objective_kernel(const __grid_constant__ ObjectiveParams p) {
    const int64_t n = p.n, first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    const float denominator = denominator_in_use(p, first);
    for (int64_t row = first; row < n; row += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        const RowStats stats = {p.stats[row], p.stats[n + row], p.stats[2 * n + row]};
        const float logp = stats.logprob(inverse_temperature(p.temperature, row));
        const RowLoss loss = p.tokens.loss(row, logp, denominator);
        p.logprobs[row] = logp;
        p.row_losses[row] = loss.value;
        p.coefficients[row] = loss.coefficient;
    }
}

template <class Z>
__global__ void __launch_bounds__(kMaxThreads)
    terms_objective_kernel(const __grid_constant__ WithTerms<ObjectiveParams> p) {
    const ObjectiveParams& plain = p.plain;
    const int64_t n = plain.n, first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    const float denominator = denominator_in_use(plain, first);
    for (int64_t row = first; row < n; row += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        const RowTargets targets(plain.tokens.targets, p.terms, plain.stats + 2 * n, row, n);
        const Z z = Z::of(p.terms.softcap, inverse_temperature(plain.temperature, row));
        const TermsStats<Z> stats = read_terms_stats(plain.stats, targets, z);
        TargetSums sums;
        for (int k = 0; k < targets.num(); ++k) {
            const float logp = stats.logprob(targets.logit(k));
            sums.add(targets.share(k), logp);
            plain.logprobs[k * n + row] = targets.ignored(k) ? 0.f : logp;
        }
        plain.logprobs[targets.num() * n + row] = p.terms.entropy ? stats.entropy() : 0.f;
        const TermsLoss loss = terms_loss(plain.tokens, p.terms, row, seen(stats, sums), denominator);
        plain.row_losses[row] = loss.value;
        const float by[] = {loss.by.g, loss.by.h, loss.by.zeta, loss.by.s};
#pragma unroll
        for (int i = 0; i < 4; ++i) plain.coefficients[i * n + row] = by[i];
    }
}

// The sum over n rows in double and in a fixed order, by one block; in all threads.
template <class Value>
__device__ __forceinline__ double sum_rows(int64_t n, Value value) {
    double sum = 0.0;
#pragma unroll 4
    for (int64_t row = threadIdx.x; row < n; row += blockDim.x) sum += value(row);
    BlockReduce<double> block_reduce(shared_memory<BlockReduce<double>::Shared>());
    return block_reduce(sum, 0.0, [](double x) { return warp_sum(x); });
}

// What a mean divides by: the sum of the active tokens' weights, into row_losses[n].
struct NormaliserParams {
    Tokens tokens;
    int64_t n;
    float* row_losses;
};

__global__ void __launch_bounds__(kMaxThreads) normaliser_kernel(const __grid_constant__ NormaliserParams p) {
    const double sum =
        sum_rows(p.n, [&](int64_t row) -> double { return p.tokens.active(row) ? p.tokens.weights.at(row) : 0.f; });
    if (threadIdx.x == 0) p.row_losses[p.n] = static_cast<float>(sum);
}

struct TotalParams {
    Column denominator;
    bool mean;  // the denominator is already in row_losses[n]
    int64_t n;
    float* row_losses;
    float* loss;
};

__global__ void __launch_bounds__(kMaxThreads) total_kernel(const __grid_constant__ TotalParams p) {
    const double total = sum_rows(p.n, [&](int64_t row) -> double { return p.row_losses[row]; });
    if (threadIdx.x != 0) return;
    const float denominator = p.mean ? p.row_losses[p.n] : p.denominator.at(0);
    p.row_losses[p.n] = denominator;
    *p.loss = reduced_loss(total, denominator);
}

}  // namespace fused_losses
