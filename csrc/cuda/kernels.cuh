// The stages over V: a row's business (plain_row.cuh, terms_row.cuh) walked by two_sweeps.cuh, one block per row.
#pragma once

#include "plain_row.cuh"
#include "terms_row.cuh"

namespace fused_losses {

// One pass: sweep, reduce, evaluate the objective, sweep again. The second sweep finds the row in L2 as long as the
// rows in flight fit there; launch.cu sees to that.
template <class T, class Row>
__global__ void __launch_bounds__(Row::kThreads, 1) loss_and_grad_kernel(const __grid_constant__ LossAndGradParams p) {
    typename Row::Shared& shared = shared_memory<typename Row::Shared>();
    int turn = 0;
    const Problem& problem = p.problem;
    const int vocab = static_cast<int>(p.logits.vocab);
    for (int64_t i = blockIdx.x; i < p.logits.n; i += gridDim.x) {
        Row row(problem.targets, problem.transform, i, vocab, p.logprobs.data, p.logprobs.n);
        const T* logits = row_pointer<T>(p.logits, i);
        const bool reads = problem.reads(i);
        if (reads) {
            row.read_targets(logits, p.logprobs.data);
            row.see(sum_row<typename Row::Sums>(logits, vocab, row.left_out, row.z), shared, turn);
            row.evaluate(problem, problem.denominator.at(0), shared, turn);
        }
        if (threadIdx.x == 0) row.store(p.logprobs, p.row_losses, problem.terms, reads);
        T* grad = row_pointer<T>(p.grad, i);
        if (row.idle())  // as where the row was not read
            zero_row(grad, vocab);
        else
            row.write_targets(grad, map_row(logits, grad, vocab, row.dense()));
        row.finish(p.logprobs, threadIdx.x, blockDim.x, reads);
    }
}

template <class T, class Row>
__global__ void __launch_bounds__(Row::kThreads, 1) stats_kernel(const __grid_constant__ StatsParams p) {
    typename Row::Shared& shared = shared_memory<typename Row::Shared>();
    int turn = 0;
    const Problem& problem = p.problem;
    const int vocab = static_cast<int>(p.logits.vocab);
    float* const target_logits = &p.stats.target(0);
    for (int64_t i = blockIdx.x; i < p.logits.n; i += gridDim.x) {
        Row row(problem.targets, problem.transform, i, vocab, target_logits, p.stats.n);
        const bool reads = problem.reads(i);
        if (reads) {
            const T* logits = row_pointer<T>(p.logits, i);
            row.read_targets(logits, target_logits);
            row.see(sum_row<typename Row::Sums>(logits, vocab, row.left_out, row.z), shared, turn);
        }
        row.keep(p.stats, problem.terms, reads);
    }
}

template <class T, class Row>
__global__ void __launch_bounds__(Row::kThreads, 1) grad_kernel(const __grid_constant__ GradParams p) {
    typename Row::Shared& shared = shared_memory<typename Row::Shared>();
    int turn = 0;
    const int vocab = static_cast<int>(p.logits.vocab);
    for (int64_t i = blockIdx.x; i < p.logits.n; i += gridDim.x) {
        Row row(p.targets, p.transform, i, vocab, &p.stats.target(0), p.stats.n);
        row.recall(p.stats);
        row.send(p.coefficients, p.upstream.at(i), shared, turn);
        T* grad = row_pointer<T>(p.grad, i);
        if (row.idle())
            zero_row(grad, vocab);
        else
            row.write_targets(grad, map_row(row_pointer<T>(p.logits, i), grad, vocab, row.dense()));
    }
}

}  // namespace fused_losses
