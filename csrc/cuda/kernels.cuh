// The stages over V: a row's business (plain_row.cuh, terms_row.cuh) walked by an engine (two_sweeps.cuh, on_chip.cuh),
// one block per row.
#pragma once

#include "on_chip.cuh"
#include "plain_row.cuh"
#include "terms_row.cuh"
#include "token_ring.cuh"

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
        Row row(problem.targets, problem.transform, i, i, vocab, p.logprobs.data, p.logprobs.n);
        const T* logits = row_pointer<T>(p.logits, i);
        const bool reads = problem.reads(i);
        if (reads) {
            row.read_targets(logits, p.logprobs.data);
            row.see(row.gather(sum_row<typename Row::Sums>(logits, vocab, row.left_out, row.z), shared, turn));
            row.evaluate(problem, problem.denominator.at(0), shared, turn);
        }
        if (threadIdx.x == 0) row.store(p.logprobs, p.row_losses, problem.terms, reads);
        T* grad = row_pointer<T>(p.grad, i);
        if (row.idle())  // as where the row was not read
            zero_row(grad, vocab);
        else
            row.write_targets(grad, map_row(logits, grad, vocab, row.template dense<Distance>()));
        row.finish(p.logprobs, threadIdx.x, blockDim.x, reads);
    }
}

struct OnChipParams {
    LossAndGradParams asked;
    int log_step;   // of the vectors in a chunk
    int chunks;     // in shared memory
    int announced;  // vectors of the next row that are brought to L2 ahead of their copies
};

template <class Row>
struct alignas(16) OnChipShared {
    typename Row::Shared row;
    float target[2];  // the target's logit, of reductions in turn
    TokenRing ring;
};

// The same, while the row is on chip. A row that the engine can't map, as its gradient has another phase or its maximum
// is too far for a fold, is swept by the other engine: so that which kernel runs depends on no row and on no layout.
template <class T, class Row>
__global__ void __launch_bounds__(Row::kThreadsOnChip, 1) on_chip_kernel(const __grid_constant__ OnChipParams params) {
    using Sums = typename Row::Sums;
    OnChipShared<Row>& shared = shared_memory<OnChipShared<Row>>();
    TokenRing& ring = shared.ring;
    const OnChip<T> chip(reinterpret_cast<uint4*>(&shared + 1), params.chunks, params.log_step);
    const LossAndGradParams& p = params.asked;
    const Problem& problem = ring.problem;
    const int64_t n = p.logits.n;
    const int vocab = static_cast<int>(p.logits.vocab);
    const auto row_of = [](const Rows& rows,
                           int64_t i) {  // in most tensors without its divisions: a hundred instructions
        return static_cast<T*>(rows.data) + (i < rows.inner ? i * rows.inner_stride : rows.offset(i));
    };
    const auto token = [&](int slot, int64_t i) -> int64_t { return Row::kSingle || ring.single() ? slot : i; };
    const auto row_to_read = [&](int slot, int64_t i) -> const T* {
        return i < n && problem.reads(token(slot, i)) ? row_of(p.logits, i) : nullptr;
    };
    const auto fetch_token = [&](int slot, int64_t i) {
        if (i < n) ring.fetch(slot, i);
    };

    ring.start(p.problem);
    __syncthreads();
    fetch_token(0, blockIdx.x);
    fetch_token(1, blockIdx.x + int64_t{gridDim.x});
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const T* logits = row_to_read(0, blockIdx.x);
    chip.fetch(logits, vocab);
    int turn = 0, slot = 0;
    for (int64_t i = blockIdx.x; i < n; i += gridDim.x) {
        const int next_slot = slot == 2 ? 0 : slot + 1, last_slot = slot == 0 ? 2 : slot - 1;
        Row row(problem.targets, problem.transform, token(slot, i), i, vocab, p.logprobs.data, p.logprobs.n);
        bool near = true;
        uint32_t costly = 0;
        if (logits) {
            float& target = shared.target[turn];
            row.read_several_targets(logits, p.logprobs.data);
            const Online<Sums> mine = chip.template sum<Sums>(logits, vocab, row.left_out, row.z, target, costly);
            const Online<Sums> all = row.gather(mine, shared.row, turn);
            row.take_target(target);
            row.see(all);
            near = row.near();
            if (!near) row.see(row.gather(sum_row<Sums>(logits, vocab, row.left_out, row.z), shared.row, turn));
        } else {
            chip.wait_first();
            __syncthreads();
        }
        // One barrier ago, at least: all threads see the next token, and none needs the last one's numbers.
        const T* const next = row_to_read(next_slot, i + gridDim.x);
        fetch_token(last_slot, i + 2 * int64_t{gridDim.x});
        chip.announce(next, vocab, params.announced);
        if (logits) row.evaluate(problem, problem.denominator.at(0), shared.row, turn);
        if (threadIdx.x == 0) row.store(p.logprobs, p.row_losses, problem.terms, logits);
        T* const grad = row_of(p.grad, i);
        const bool idle = row.idle(), from_slots = !idle && near && skew_of<T>(logits, grad) == 0;
        if (!from_slots) chip.fetch(next, vocab);
        if (idle)
            zero_row(grad, vocab);
        else if (from_slots)
            row.write_targets(
                grad, chip.template map<decltype(row.z)>(logits, grad, vocab, next, row.template dense<Folded>(),
                                                         row.template dense<Folded, true>(), costly));
        else
            row.write_targets(grad, map_row(logits, grad, vocab, row.template dense<FoldedIfNear>()));
        row.finish(p.logprobs, threadIdx.x, blockDim.x, logits);
        logits = next;
        slot = next_slot;
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
        Row row(problem.targets, problem.transform, i, i, vocab, target_logits, p.stats.n);
        const bool reads = problem.reads(i);
        if (reads) {
            const T* logits = row_pointer<T>(p.logits, i);
            row.read_targets(logits, target_logits);
            row.see(row.gather(sum_row<typename Row::Sums>(logits, vocab, row.left_out, row.z), shared, turn));
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
        Row row(p.targets, p.transform, i, i, vocab, &p.stats.target(0), p.stats.n);
        row.recall(p.stats);
        row.send(p.coefficients, p.upstream.at(i), shared, turn);
        T* grad = row_pointer<T>(p.grad, i);
        if (row.idle())
            zero_row(grad, vocab);
        else
            row.write_targets(grad, map_row(row_pointer<T>(p.logits, i), grad, vocab, row.template dense<Distance>()));
    }
}

}  // namespace fused_losses
