// The N-sized kernels: the objective alone, the normaliser before it, the reduction after it.
#pragma once

#include "plain_row.cuh"
#include "terms_row.cuh"

namespace fused_losses {

// The sum over n rows in double and in a fixed order, by one block; in all threads. Eight numbers of a thread at a
// time, of which those beyond the end are its first one's again: with a test before each load, each would wait for the
// one before.
template <class Value>
__device__ __forceinline__ double sum_rows(Partials<double, 1>& shared, int64_t n, Value value) {
    constexpr int kTogether = 8;
    const int64_t step = blockDim.x;
    double sum = 0.0;
    for (int64_t first = threadIdx.x; first < n; first += kTogether * step) {
        float numbers[kTogether];
#pragma unroll
        for (int u = 0; u < kTogether; ++u) {
            const int64_t row = first + u * step;
            numbers[u] = value(row < n ? row : first);
        }
#pragma unroll
        for (int u = 0; u < kTogether; ++u) sum += first + u * step < n ? numbers[u] : 0.f;
    }
    int turn = 0;
    return block_reduce(shared, turn, sum, 0.0, [](double x, bool few) { return warp_sum(x, few); });
}

// Of single targets without a loop over them, and by their type, for the same reason.
template <class Index>
__device__ __forceinline__ double sum_weights(Partials<double, 1>& shared, int64_t n, const Targets& targets,
                                              const Column& weights) {
    const Index* const of_token = static_cast<const Index*>(targets.data);
    const int64_t ignore_index = targets.ignore_index;
    return sum_rows(shared, n, [&](int64_t row) {
        const float weight = weights.at(row);
        return of_token[row] == ignore_index ? 0.f : weight;
    });
}
__device__ __forceinline__ float normaliser_of(Partials<double, 1>& shared, int64_t n, const Targets& targets,
                                               const Column& weights) {
    double sum;
    if (!targets.single())
        sum = sum_rows(shared, n, [&](int64_t row) { return targets.ignored(row) ? 0.f : weights.at(row); });
    else if (targets.is_int64)
        sum = sum_weights<int64_t>(shared, n, targets, weights);
    else
        sum = sum_weights<int32_t>(shared, n, targets, weights);
    return static_cast<float>(sum);
}

constexpr int kRowThreads = 128;

// A thread per row.
template <class Row>
__global__ void __launch_bounds__(kRowThreads) objective_kernel(const __grid_constant__ ObjectiveParams p) {
    const Problem& problem = p.problem;
    const int vocab = static_cast<int>(problem.vocab);
    const float denominator = problem.denominator.at(0);
    const int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
    for (int64_t i = first; i < p.n; i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
        Row row(problem.targets, problem.transform, i, i, i, vocab, &p.stats.target(0), p.stats.n);
        const bool reads = problem.reads(i);
        if (reads) {
            row.recall(p.stats);
            row.evaluate(problem, denominator);
        }
        row.store(p.logprobs, p.row_losses, problem.terms.entropy, reads);
        row.finish(p.logprobs, 0, 1, reads);
        row.keep(p.coefficients);
    }
}

__global__ void __launch_bounds__(kMaxThreads) normaliser_kernel(const __grid_constant__ NormaliserParams p) {
    const float normaliser = normaliser_of(shared_memory<Partials<double, 1>>(), p.n, p.targets, p.weights);
    if (threadIdx.x == 0) *p.normaliser = normaliser;
}

struct TotalParams {
    int64_t n;
    const float* row_losses;
    Column denominator;
    float* loss;
};

__global__ void __launch_bounds__(kMaxThreads) total_kernel(const __grid_constant__ TotalParams p) {
    const double total =
        sum_rows(shared_memory<Partials<double, 1>>(), p.n, [&](int64_t row) { return p.row_losses[row]; });
    if (threadIdx.x == 0) *p.loss = reduced_loss(total, p.denominator.at(0));
}

}  // namespace fused_losses
