// The numbers of the tokens whose rows come next, in shared memory: copied two rows ahead, as a plain load that is
// wanted at once makes a block wait for L2 or DRAM, and one that is issued ahead makes its loops wait (on_chip.cuh).
#pragma once

#include "../problem.h"
#include "async.cuh"

namespace fused_losses {

// Of one target per token. Several stay where they are, and so do the other numbers of their tokens.
class TokenRing {
  public:
    static constexpr int kTokens = 3;  // the row's, the next row's, and one that is on its way

    Problem problem;  // the one asked; with a single target per token its tokens are those here

    // By all threads; a barrier must follow.
    __device__ __forceinline__ void start(const Problem& given) {
        if (threadIdx.x != 0) return;
        problem = given;
        problem.denominator = {nullptr, 0, given.denominator.at(0)};  // a mean's is not there yet
        targets_ = given.targets;
        if (!given.targets.single()) return;
        Terms& terms = problem.terms;
        Column* const columns[kColumns] = {
            &problem.inputs[0],        &problem.inputs[1],    &problem.inputs[2],
            &problem.inputs[3],        &problem.inputs[4],    &problem.inputs[5],
            &problem.inputs[6],        &problem.weights,      &problem.transform.temperature,
            &terms.importance_weights, &terms.ref_logprobs,   &terms.kl_coef,
            &terms.entropy_coef,       &terms.log_ratio_clamp};
        static_assert(kMaxInputs == 7 && sizeof(Terms) == 5 * sizeof(Column) + 16, "all columns are named above");
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            columns_[i] = *columns[i];
            if (columns[i]->data) *columns[i] = {numbers_[i], 1, 0.f};  // else one number for all tokens
        }
        columns_[kShares] = {given.targets.shares, 1, 0.f};
        if (given.targets.shares) problem.targets.shares = numbers_[kShares];
        problem.targets.data = indices_;
    }

    // Begins to copy what token i has: what is there now nobody may need any more. A thread that waits for its next
    // group of copies has waited for these, too; the others see them after a barrier.
    __device__ __forceinline__ void fetch(int slot, int64_t i) {
        const int thread = threadIdx.x;
        if (thread > kShares + 1 || !targets_.single()) return;
        if (thread <= kShares) {
            const Column& column = columns_[thread];
            if (column.data) copy_async(&numbers_[thread][slot], column.data + i * column.stride);
        } else if (targets_.is_int64) {
            copy_async(indices_ + slot, static_cast<const int64_t*>(targets_.data) + i);
        } else {
            copy_async(reinterpret_cast<int32_t*>(indices_) + slot, static_cast<const int32_t*>(targets_.data) + i);
        }
    }

    __device__ __forceinline__ bool single() const { return targets_.single(); }

  private:
    static constexpr int kColumns = kMaxInputs + 7, kShares = kColumns;

    Targets targets_;
    Column columns_[kColumns + 1];
    float numbers_[kColumns + 1][kTokens];
    int64_t indices_[kTokens];  // or int32_t
};

}  // namespace fused_losses
