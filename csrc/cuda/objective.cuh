// The N-sized kernels: the objective alone, the normaliser before it, the reduction after it.
#pragma once

#include "softmax.cuh"

namespace fused_losses {

__global__ void __launch_bounds__(kMaxThreads) objective_kernel(const __grid_constant__ ObjectiveParams p) {
    const int64_t n = p.n, first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    const float denominator = !p.loss ? 1.f : p.mean ? p.row_losses[n] : p.denominator.at(0);
    if (!p.loss && first == 0) p.row_losses[n] = denominator;
    for (int64_t row = first; row < n; row += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        const RowStats stats = {p.stats[row], p.stats[n + row], p.stats[2 * n + row]};
        const float logp = stats.logprob(inverse_temperature(p.temperature, row));
        const RowLoss loss = p.tokens.loss(row, logp, denominator);
        p.logprobs[row] = logp;
        p.row_losses[row] = loss.value;
        p.coefficients[row] = loss.coefficient;
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
