// One pass over a row by one block: sweep, reduce, evaluate the objective, sweep again. The second sweep finds the row
// in L2 as long as the rows in flight fit there; launch.cu sees to that.
#pragma once

#include "terms.cuh"

namespace fused_losses {

template <class T>
__global__ void __launch_bounds__(kMaxThreads) loss_and_grad_kernel(const __grid_constant__ LossAndGradParams p) {
    BlockReduce<Online<Sum>> block_reduce(shared_memory<BlockReduce<Online<Sum>>::Shared>());
    const int vocab = static_cast<int>(p.vocab);
    const Tokens& tokens = p.tokens;
    for (int64_t row = blockIdx.x; row < p.logits.n; row += gridDim.x) {
        float logp = 0.f;
        RowLoss loss = {0.f, 0.f};
        RowStats stats = {0.f, 1.f, 0.f};
        const T* logits = row_pointer<T>(p.logits, row);
        const int target = target_index(tokens.targets, row, vocab);
        const float inverse_t = inverse_temperature(p.temperature, row);
        if (reads_logits(tokens.targets, tokens.weights, p.all_logprobs, row)) {
            stats = row_stats(logits, vocab, target, inverse_t, block_reduce);
            // Every thread evaluates the objective; to tell one thread's result to the others would cost a barrier.
            logp = stats.logprob(inverse_t);
            loss = tokens.loss(row, logp, p.mean ? p.row_losses[p.logits.n] : p.denominator.at(0));
        }
        if (threadIdx.x == 0) {
            p.logprobs[row] = logp;
            p.row_losses[row] = loss.value;
        }
        // Also where the logits were not read: the coefficient is 0 there.
        write_gradient(logits, row_pointer<T>(p.grad, row), vocab, target, loss.coefficient, inverse_t, stats);
    }
}

struct TermsShared {
    BlockReduce<Online<Moments>>::Shared row;
    BlockReduce<TargetSums>::Shared targets;
};

// Of several targets, logprobs holds the logits until the gradient, which may overwrite them, has been written.
template <class T, class Z>
__global__ void __launch_bounds__(Z::kThreads, 1)
    terms_loss_and_grad_kernel(const __grid_constant__ WithTerms<LossAndGradParams> p) {
    TermsShared& shared = shared_memory<TermsShared>();
    BlockReduce<Online<Moments>> reduce_row(shared.row);
    BlockReduce<TargetSums> reduce_targets(shared.targets);
    const LossAndGradParams& plain = p.plain;
    const Tokens& tokens = plain.tokens;
    const int vocab = static_cast<int>(plain.vocab);
    const int64_t n = plain.logits.n;
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        const T* logits = row_pointer<T>(plain.logits, row);
        const RowTargets targets(tokens.targets, p.terms, plain.logprobs, row, n);
        const int num = targets.num();
        const float inverse_t = inverse_temperature(plain.temperature, row);
        TermsStats<Z> stats{Z::of(p.terms.softcap, inverse_t)};
        TermsLoss loss{};
        TargetSums sums;
        float first = 0.f, entropy = 0.f;
        const bool reads = reads_logits(tokens.targets, tokens.weights, plain.all_logprobs, row);
        if (reads) {
            first = target_logit(logits, vocab, targets, 0);
            for (int k = threadIdx.x; num > 1 && k < num; k += blockDim.x)
                plain.logprobs[k * n + row] = target_logit(logits, vocab, targets, k);
            stats = terms_stats(logits, vocab, stats.z, reduce_row);
            sums = sum_targets(targets, first, stats, reduce_targets);
            loss = terms_loss(tokens, p.terms, row, seen(stats, sums),
                              plain.mean ? plain.row_losses[n] : plain.denominator.at(0));
            if (p.terms.entropy) entropy = stats.entropy();
        }
        if (threadIdx.x == 0) {
            plain.logprobs[num * n + row] = entropy;
            plain.row_losses[row] = loss.value;
        }
        write_terms_gradient(logits, row_pointer<T>(plain.grad, row), vocab, targets, first, sums.total, loss.by,
                             inverse_t, stats);
        for (int k = threadIdx.x; k < num; k += blockDim.x) {
            const float logit = num > 1 ? targets.logit(k) : first;
            plain.logprobs[k * n + row] = reads && !targets.ignored(k) ? stats.logprob(logit) : 0.f;
        }
    }
}

}  // namespace fused_losses
