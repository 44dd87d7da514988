// The row of a plain loss: one target, no softcap, no terms. A loss sees three numbers of it and sends one back.
#pragma once

#include "row.cuh"

namespace fused_losses {

class PlainRow {
  public:
    using OnChip = PlainRow;               // the same row beside a TokenRing
    static constexpr bool kSingle = true;  // whether a token always has one target
    static constexpr bool kStatistics = false;
    using Sums = Sum;
    using Shared = Partials<Online<Sum>>;
    static constexpr int kThreads = kMaxThreads, kGradThreads = kMaxThreads;
    static constexpr int kThreadsOnChip = 768;

    const Identity z;
    const int left_out;  // the target; -1 if it is outside [0, V)

    // token: where its numbers and its target are; aim, row.cuh: the same.
    template <class Aims, class PerToken>
    __device__ __forceinline__ PlainRow(const Aims& targets, const TransformOf<PerToken>& transform, int64_t token,
                                        int64_t, int64_t row, int vocab, const float*, int64_t)
        : PlainRow(Identity::of(0.f, transform.inverse_temperature(token)), target_index(targets, token, vocab),
                   targets, token, token, row, vocab, nullptr, 0) {}
    // Whose z and left_out are known.
    template <class Aims>
    __device__ __forceinline__ PlainRow(const Identity& z_, int left_out_, const Aims&, int64_t token, int64_t,
                                        int64_t row, int, const float*, int64_t)
        : z(z_), left_out(left_out_), token_(token), row_(row) {}

    template <class T>
    __device__ __forceinline__ void read_targets(const T* logits, float*) {
        target_ = target_logit(logits, left_out);
    }

    template <class T>
    __device__ __forceinline__ void read_several_targets(const T*, float*) const {}
    // target: its logit, where there is one.
    __device__ __forceinline__ void take_target(float target) { target_ = left_out >= 0 ? target : NAN; }

    // mine: what this thread has summed. By all threads of a team, who get the same.
    __device__ __forceinline__ Online<Sum> gather(const Online<Sum>& mine, Shared& shared, int& turn,
                                                  const Team& team = Team()) const {
        const Identity by = z;
        return team_reduce(team, shared, turn, mine, Online<Sum>{},
                           [by](const Online<Sum>& x, bool few) { return warp_sum(x, by, few); });
    }
    __device__ __forceinline__ void see(const Online<Sum>& all) {
        sum_ = all.sums.sum;
        maximum_ = sum_ == 0.f ? target_ : all.max;
    }
    __device__ __forceinline__ bool near() const { return all_near(z, sum_, maximum_, raw_top()); }

    __device__ __forceinline__ void keep(const StatsTable<float>& stats, const Terms&, bool) const {
        if (threadIdx.x != 0) return;
        stats.maximum(row_) = maximum_;
        stats.sum(row_) = sum_;
        stats.target(row_) = target_;
    }
    __device__ __forceinline__ void recall(const StatsTable<const float>& stats) {
        maximum_ = stats.maximum(row_);
        sum_ = stats.sum(row_);
        target_ = stats.target(row_);
    }

    // By every thread of a block: to tell one thread's result to the others would cost a barrier.
    template <class Problem>
    __device__ __forceinline__ void evaluate(const Problem& problem, float denominator, Shared&, int&) {
        evaluate(problem, denominator);
    }
    // By one thread for itself.
    template <class Problem>
    __device__ __forceinline__ void evaluate(const Problem& problem, float denominator) {
        softmax_ = softmax();
        loss_ = plain_loss(problem, token_, softmax_.logprob(), denominator);
    }

    // By one thread. entropy: whether it is asked for; reads: whether the row was read.
    __device__ __forceinline__ void store(const LogprobsTable& logprobs, float* row_losses, bool, bool reads) const {
        logprobs.target(row_) = reads ? softmax_.logprob() : 0.f;
        row_losses[row_] = loss_.value;
    }
    // first, step: of the targets that this thread sees to.
    __device__ __forceinline__ void finish(const LogprobsTable&, int, int, bool) const {}
    __device__ __forceinline__ void keep(const CoefficientsTable<float>& coefficients) const {
        coefficients.at(row_) = loss_.by.g;
    }

    __device__ __forceinline__ void send(const CoefficientsTable<const float>& coefficients, float upstream, Shared&,
                                         int&) {
        loss_.by.g = times(coefficients.at(row_), upstream);
        if (!idle()) softmax_ = softmax();
    }

    // Whether the gradient is 0, for which no logits are read: select, as 0 * NaN is not 0.
    __device__ __forceinline__ bool idle() const { return loss_.by.g == 0.f; }

    // What an element that is no target's gets. Exponent: Distance or another. A logit is its own level.
    template <template <class> class Exponent, Seen = Seen::logit>
    __device__ __forceinline__ auto dense() const {
        const Exponent<Identity> exponent(z, raw_top());
        const float factor = z.scale * (-loss_.by.g * reciprocal_approx(softmax_.total)) * exponent.correction();
        return [=](float x) { return factor * exp2_approx(exponent(x)); };
    }

    // No comparison per element: the thread that has just written the target's element writes it again, formed in
    // float32, as 1 - p is lost in bfloat16 when p is near 1. element: left_out, in the part of the row that grad is.
    template <class T, class Span>
    __device__ __forceinline__ void write_targets(T* grad, const Span& span, int element) const {
        if (element >= 0 && static_cast<int>(threadIdx.x) == span.owner(element))
            assign(grad[element], z.scale * target_gradient(by(), 1.f, 1.f, target_seen(softmax_), 0.f));
    }

  private:
    __device__ __forceinline__ float raw_top() const { return fmaxf(maximum_, target_); }
    __device__ __forceinline__ Softmax softmax() const {
        return softmax_of(distance_from(maximum_, target_, z), sum_, 0.f);
    }
    __device__ __forceinline__ Coefficients by() const { return {loss_.by.g, 0.f, 0.f, 0.f}; }

    const int64_t token_, row_;
    float maximum_ = 0.f, sum_ = 0.f, target_ = 0.f;
    Softmax softmax_{};
    TokenLoss loss_{};
};

}  // namespace fused_losses
