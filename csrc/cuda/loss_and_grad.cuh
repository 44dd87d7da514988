// One pass over a row by one block: sweep, reduce, evaluate the objective, sweep again. The second sweep finds the row
// in L2 as long as the rows in flight fit there; launch.cu sees to that.
#pragma once

#include "softmax.cuh"

namespace fused_losses {

template <class T>
__global__ void __launch_bounds__(kMaxThreads) loss_and_grad_kernel(const __grid_constant__ LossAndGradParams p) {
    BlockReduce<OnlineSum> block_reduce(shared_memory<BlockReduce<OnlineSum>::Shared>());
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

}  // namespace fused_losses
