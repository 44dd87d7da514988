// Stage 1 alone: one block sweeps a row and writes three numbers.
#pragma once

#include "softmax.cuh"

namespace fused_losses {

template <class T>
__global__ void __launch_bounds__(kMaxThreads) stats_kernel(const __grid_constant__ StatsParams p) {
    BlockReduce<OnlineSum> block_reduce(shared_memory<BlockReduce<OnlineSum>::Shared>());
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

}  // namespace fused_losses
