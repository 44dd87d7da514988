// The numbers of the tokens whose rows come next, in shared memory: copied three rows ahead, as a plain load that is
// wanted at once makes a block wait for L2 or DRAM, and one that is issued ahead makes its loops wait (on_chip.cuh).
// They lie where the compiler knows: to look for a Column's number first was a third of what a row costs beside its
// elements.
#pragma once

#include "../problem.h"
#include "async.cuh"

namespace fused_losses {

// The row's, the next row's, which is prepared, those of the one after it, which have come, and one that is on its way.
constexpr int kRingTokens = 4;

// A token's place in the ring, so many after another's.
__device__ __forceinline__ int ring_slot(int slot, int after) { return (slot + after) % kRingTokens; }

// A number of each token in the ring. Read at a token's slot.
struct RingColumn {
    float numbers[kRingTokens];

    __device__ __forceinline__ float at(int64_t slot) const { return numbers[slot]; }
};

// A single target of each token in the ring, read at its slot; several stay where they are, and are read at the token.
// kAlwaysSingle: there are never several.
template <bool kAlwaysSingle>
class RingTargets {
  public:
    int64_t ignore_index, num;

    __device__ __forceinline__ void start(const Targets& given) {
        given_ = given;
        ignore_index = given.ignore_index;
        num = given.num;
        for (float& share : shares_) share = 1.f;
    }
    __device__ __forceinline__ bool single() const { return kAlwaysSingle || num == 1; }
    __device__ __forceinline__ int64_t at(int64_t i) const {
        if (!single()) return given_.at(i);
        return given_.is_int64 ? indices_[i] : *reinterpret_cast<const int32_t*>(indices_ + i);
    }
    __device__ __forceinline__ int64_t at(int64_t aim, int64_t k) const { return at(aim * num + k); }
    __device__ __forceinline__ float share(int64_t aim, int64_t k) const {
        return single() ? shares_[aim] : given_.share(aim, k);
    }
    __device__ __forceinline__ bool ignored(int64_t aim) const {
        if (single()) return at(aim) == ignore_index;
        return given_.ignored(aim);
    }

    // Of a single target: begins to copy that of token i, by one thread, and its share, by another.
    __device__ __forceinline__ void fetch(int slot, int64_t i) {
        if (given_.is_int64)
            copy_async(indices_ + slot, static_cast<const int64_t*>(given_.data) + i);
        else
            copy_async(reinterpret_cast<int32_t*>(indices_ + slot), static_cast<const int32_t*>(given_.data) + i);
    }
    __device__ __forceinline__ void fetch_share(int slot, int64_t i) {
        if (given_.shares) copy_async(shares_ + slot, given_.shares + i);
    }

  private:
    Targets given_;
    int64_t indices_[kRingTokens];  // or an int32_t each
    float shares_[kRingTokens];
};

template <bool kAlwaysSingle>
class TokenRing {
  public:
    ProblemOf<RingTargets<kAlwaysSingle>, RingColumn> problem;  // the one asked; its tokens are those here

    // By all threads; a barrier must follow.
    __device__ __forceinline__ void start(const Problem& given) {
        if (threadIdx.x != 0) return;
        const Terms& from = given.terms;
        auto& terms = problem.terms;
        problem.targets.start(given.targets);
        problem.transform.softcap = given.transform.softcap;
        problem.objective = given.objective;
        problem.vocab = given.vocab;
        problem.all_logprobs = given.all_logprobs;
        problem.plain = given.plain;
        terms.label_smoothing = from.label_smoothing;
        terms.z_loss = from.z_loss;
        terms.kl_type = from.kl_type;
        terms.kl_weighted_by_ratio = from.kl_weighted_by_ratio;
        terms.entropy = from.entropy;
        set(problem.denominator, given.denominator.at(0));
        take(0, given.weights, problem.weights);
        take(1, given.transform.temperature, problem.transform.temperature);
        take(2, from.importance_weights, terms.importance_weights);
        take(3, from.ref_logprobs, terms.ref_logprobs);
        take(4, from.kl_coef, terms.kl_coef);
        take(5, from.entropy_coef, terms.entropy_coef);
        take(6, from.log_ratio_clamp, terms.log_ratio_clamp);
#pragma unroll
        for (int i = 0; i < kMaxInputs; ++i) take(7 + i, given.inputs[i], problem.inputs[i]);
    }
    // By one thread; a barrier must follow.
    __device__ __forceinline__ void set_denominator(float denominator) { set(problem.denominator, denominator); }

    // By a warp: begins to copy what token i has; what is there now nobody may need any more. A lane that waits for its
    // next group of copies has waited for these, too; its warp sees them after a __syncwarp, others after a barrier.
    __device__ __forceinline__ void fetch(int slot, int64_t i) {
        const int lane = threadIdx.x % 32;
        if (lane < kColumns) {
            const Source& source = sources_[lane];
            if (source.data) copy_async(source.to->numbers + slot, source.data + i * source.stride);
        } else if (lane == kColumns && problem.targets.single()) {
            problem.targets.fetch(slot, i);
        } else if (lane == kColumns + 1 && problem.targets.single()) {
            problem.targets.fetch_share(slot, i);
        }
    }

  private:
    static constexpr int kColumns = kMaxInputs + 7;
    static_assert(kColumns + 2 <= 32, "numbers without a lane");
    static_assert(sizeof(Terms) == 5 * sizeof(Column) + 16, "all columns are named above");

    struct Source {
        const float* data;  // null: one number for all tokens
        int64_t stride;
        RingColumn* to;
    };

    static __device__ __forceinline__ void set(RingColumn& column, float number) {
#pragma unroll
        for (float& each : column.numbers) each = number;
    }
    __device__ __forceinline__ void take(int i, const Column& column, RingColumn& to) {
        sources_[i] = {column.data, column.stride, &to};
        if (!column.data) set(to, column.value);
    }

    Source sources_[kColumns];
};

}  // namespace fused_losses
