// Stage 1 alone: one block sweeps a row and writes three numbers, K + 4 for a loss with terms.
#pragma once

#include "terms.cuh"

namespace fused_losses {

template <class T>
__global__ void __launch_bounds__(kMaxThreads) stats_kernel(const __grid_constant__ StatsParams p) {
    BlockReduce<Online<Sum>> block_reduce(shared_memory<BlockReduce<Online<Sum>>::Shared>());
    const int vocab = static_cast<int>(p.vocab);
    const int64_t n = p.logits.n;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        RowStats stats = {0.f, 1.f, 0.f};
        if (reads_logits(p.targets, p.weights, p.all_logprobs, row))
            stats = row_stats(row_pointer<T>(p.logits, row), vocab, target_index(p.targets, row, vocab),
                              inverse_temperature(p.temperature, row), block_reduce);
        if (threadIdx.x == 0) {
            p.stats[row] = stats.max;
            p.stats[n + row] = stats.sum;
            p.stats[2 * n + row] = stats.target;
        }
    }
}

template <class T, class Z>
__global__ void __launch_bounds__(Z::kThreads, 1) terms_stats_kernel(const __grid_constant__ WithTerms<StatsParams> p) {
    BlockReduce<Online<Moments>> block_reduce(shared_memory<BlockReduce<Online<Moments>>::Shared>());
    const StatsParams& plain = p.plain;
    const int vocab = static_cast<int>(plain.vocab);
    const int64_t n = plain.logits.n;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        const T* logits = row_pointer<T>(plain.logits, row);
        const RowTargets targets(plain.targets, p.terms, plain.stats + 2 * n, row, n);
        const Z z = Z::of(p.terms.softcap, inverse_temperature(plain.temperature, row));
        const bool reads = reads_logits(plain.targets, plain.weights, plain.all_logprobs, row);
        float* out = plain.stats + row;
        for (int k = threadIdx.x; k < targets.num(); k += blockDim.x)
            out[(2 + k) * n] = reads ? target_logit(logits, vocab, targets, k) : 0.f;
        TermsStats<Z> stats{z};
        if (reads) stats = terms_stats(logits, vocab, z, block_reduce);
        if (threadIdx.x == 0) {
            out[0] = stats.max;
            out[n] = stats.sum;
            out[(2 + targets.num()) * n] = p.terms.entropy ? stats.moment : 0.f;
            out[(3 + targets.num()) * n] = p.terms.label_smoothing != 0.f ? stats.mean : 0.f;
        }
    }
}

}  // namespace fused_losses
