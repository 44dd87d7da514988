// The N-sized kernels: the objective alone, the normaliser before it, the reduction after it.
#pragma once

#include "plain_row.cuh"
#include "terms_row.cuh"

namespace fused_losses {

// The sum over n rows in double and in a fixed order, by one block; in all threads.
template <class Value>
__device__ __forceinline__ double sum_rows(Partials<double>& shared, int64_t n, Value value) {
    double sum = 0.0;
#pragma unroll 8
    for (int64_t row = threadIdx.x; row < n; row += blockDim.x) sum += value(row);
    int turn = 0;
    return block_reduce(shared, turn, sum, 0.0, [](double x) { return warp_sum(x); });
}

__device__ __forceinline__ float normaliser_of(Partials<double>& shared, int64_t n, const Targets& targets,
                                               const Column& weights) {
    return static_cast<float>(sum_rows(shared, n, [&](int64_t row) -> double {
        const float weight = weights.at(row);
        return targets.ignored(row) ? 0.f : weight;
    }));
}

constexpr int kRowThreads = 256;

struct ObjectiveLaunch {
    ObjectiveParams asked;
    bool normalises;  // whether each block forms the mean's normaliser for itself
};

// A thread per row.
template <class Row>
__global__ void __launch_bounds__(kRowThreads) objective_kernel(const __grid_constant__ ObjectiveLaunch launch) {
    const ObjectiveParams& p = launch.asked;
    const Problem& problem = p.problem;
    const int vocab = static_cast<int>(problem.vocab);
    float denominator;
    if (launch.normalises) {
        denominator = normaliser_of(shared_memory<Partials<double>>(), p.n, problem.targets, problem.weights);
        if (blockIdx.x == 0 && threadIdx.x == 0) *p.loss = denominator;
    } else {
        denominator = problem.denominator.at(0);
    }
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
    const float normaliser = normaliser_of(shared_memory<Partials<double>>(), p.n, p.targets, p.weights);
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
        sum_rows(shared_memory<Partials<double>>(), p.n, [&](int64_t row) -> double { return p.row_losses[row]; });
    if (threadIdx.x == 0) *p.loss = reduced_loss(total, p.denominator.at(0));
}

}  // namespace fused_losses
