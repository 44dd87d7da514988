// The row of a loss with terms: one target or several, logits capped or not (Z), and four coefficients that are sent
// back. Which terms a loss has is not known here.
#pragma once

#include <type_traits>

#include "row.cuh"
#include "token_ring.cuh"

namespace fused_losses {

// Over the targets that count, which are those whose share is not 0.
struct TargetSums {
    float logp = 0.f;   // x = sum_k share_k logp_k; NaN if one of them is outside [0, V)
    float whole = 0.f;  // U = sum_k share_k

    __device__ __forceinline__ void add(float share, float logprob) {
        if (share == 0.f) return;
        logp += share * logprob;
        whole += share;
    }
};

__device__ __forceinline__ TargetSums warp_sum(const TargetSums& x, bool few) {
    return {warp_sum(x.logp, few), warp_sum(x.whole, few)};
}

// Several targets are dealt out, target k to thread k modulo blockDim.x: what it keeps for a target only that thread
// reads. Their logits are in a table: of the stats, or in one pass of the logprobs, until the gradient, which may
// overwrite them, is written.
template <class Z, class Aims = Targets, class Summed = Moments>
class TermsRow {
  public:
    using OnChip = TermsRow<Z, RingTargets<false>>;
    static constexpr bool kSingle = false;  // whether a token always has one target
    static constexpr bool kStatistics = std::is_same<Summed, MomentsAndSquares>::value;
    using Sums = Summed;
    static constexpr int kThreads = Z::kThreads, kGradThreads = Z::kGradThreads;
    static constexpr int kThreadsOnChip = 512;

    struct Shared {
        Partials<Online<Sums>> elements;
        Partials<TargetSums> targets;
    };

    const Z z;
    const int left_out;  // the single target; -1 if it is outside [0, V), or of several

    // token: where its numbers are; aim: where its targets are; logits: the targets', (K, n).
    template <class PerToken>
    __device__ __forceinline__ TermsRow(const Aims& targets, const TransformOf<PerToken>& transform, int64_t token,
                                        int64_t aim, int64_t row, int vocab, const float* logits, int64_t n)
        : TermsRow(Z::of(transform.softcap, transform.inverse_temperature(token)),
                   targets.single() ? target_index(targets, aim, vocab) : -1, targets, token, aim, row, vocab, logits,
                   n) {}
    // Whose z and left_out are known.
    __device__ __forceinline__ TermsRow(const Z& z_, int left_out_, const Aims& targets, int64_t token, int64_t aim,
                                        int64_t row, int vocab, const float* logits, int64_t n)
        : z(z_),
          left_out(left_out_),
          targets_(targets),
          logits_(logits + row),
          token_(token),
          aim_(aim),
          row_(row),
          n_(n),
          vocab_(vocab) {}

    template <class T>
    __device__ __forceinline__ void read_targets(const T* logits, float* table) {
        if (single())
            target_ = target_logit(logits, left_out);
        else
            read_several_targets(logits, table);
    }
    template <class T>
    __device__ __forceinline__ void read_several_targets(const T* logits, float* table) const {
        if (single()) return;
        for (int k = threadIdx.x; k < num(); k += blockDim.x) table[k * n_ + row_] = target_logit(logits, index(k));
    }
    __device__ __forceinline__ void take_target(float target) {
        if (single()) target_ = left_out >= 0 ? target : NAN;
    }

    __device__ __forceinline__ Online<Sums> gather(const Online<Sums>& mine, Shared& shared, int& turn,
                                                   const Team& team = Team()) const {
        const Z by = z;
        return team_reduce(team, shared.elements, turn, mine, Online<Sums>{},
                           [&](const Online<Sums>& x, bool few) { return warp_sum(x, by, few); });
    }
    __device__ __forceinline__ void see(const Online<Sums>& all) {
        sum_ = all.sums.sum;
        maximum_ = single() && sum_ == 0.f ? target_ : all.max;
        moment_ = all.sums.moment * kLn2;
        drift_ = all.sums.drift * kLn2 + (left_out >= 0 ? distance_from(maximum_, target_, z) : 0.f);
        if constexpr (kStatistics) squares_ = all.sums.squares;
    }
    // By all threads of a block, who have the same numbers. rival: the others' maximum. Ties are rare: only then is it
    // looked which of the equal logits is first.
    template <class T>
    __device__ __forceinline__ void rank(const T* logits, float rival) {
        top1_ = target_ > rival;
        if (target_ != rival) return;
        bool before = false;
#pragma unroll 4
        for (int j = threadIdx.x; j < left_out; j += blockDim.x) before |= to_float(logits[j]) == rival;
        top1_ = !__syncthreads_or(before);
    }
    __device__ __forceinline__ bool near() const { return all_near(z, sum_, maximum_, raw_top()); }

    // reads: whether the row was read.
    __device__ __forceinline__ void keep(const StatsTable<float>& stats, const Terms& terms, bool reads) const {
        if (!single() && !reads)
            for (int k = threadIdx.x; k < num(); k += blockDim.x) stats.target(row_, k) = 0.f;
        if (threadIdx.x != 0) return;
        stats.maximum(row_) = maximum_;
        stats.sum(row_) = sum_;
        if (single()) stats.target(row_) = target_;
        stats.moment(row_) = terms.entropy ? moment_ : 0.f;
        stats.drift(row_) = kStatistics || terms.label_smoothing != 0.f ? drift_ : 0.f;
        if constexpr (kStatistics) {
            stats.squares(row_) = squares_;
            stats.top1(row_) = top1_ ? 1.f : 0.f;
        }
    }
    __device__ __forceinline__ void recall(const StatsTable<const float>& stats) {
        maximum_ = stats.maximum(row_);
        sum_ = stats.sum(row_);
        target_ = stats.target(row_);
        moment_ = stats.moment(row_);
        drift_ = stats.drift(row_);
        if constexpr (kStatistics) {
            squares_ = stats.squares(row_);
            top1_ = stats.top1(row_) != 0.f;
        }
    }

    // By every thread of a block.
    template <class Problem>
    __device__ __forceinline__ void evaluate(const Problem& problem, float denominator, Shared& shared, int& turn) {
        softmax_ = softmax();
        sum_targets(shared, turn);
        evaluate_sums(problem, denominator);
    }
    // By one thread for itself.
    template <class Problem>
    __device__ __forceinline__ void evaluate(const Problem& problem, float denominator) {
        softmax_ = softmax();
        sums_ = sum_targets(0, 1);
        evaluate_sums(problem, denominator);
    }

    __device__ __forceinline__ void store(const LogprobsTable& logprobs, float* row_losses, bool entropy,
                                          bool reads) const {
        logprobs.entropy(row_) = reads && entropy ? softmax_.entropy() : 0.f;
        if (single()) logprobs.target(row_) = reads ? softmax_.logprob() : 0.f;
        row_losses[row_] = loss_.value;
        if constexpr (kStatistics) {
            const float maximum = z.level(maximum_) * z.scale;
            const Statistics seen = statistics_of(maximum, softmax_, squares_, drift_, vocab_, top1_ ? 1.f : 0.f);
            logprobs.store(row_, reads ? seen : Statistics{});
        }
    }
    // After the gradient: the logprobs of several targets take the place of their logits.
    __device__ __forceinline__ void finish(const LogprobsTable& logprobs, int first, int step, bool reads) const {
        if (single()) return;
        for (int k = first; k < num(); k += step) {
            const bool given = targets_.at(aim_, k) != targets_.ignore_index;
            logprobs.target(row_, k) = reads && given ? target(k).logp : 0.f;
        }
    }
    __device__ __forceinline__ void keep(const CoefficientsTable<float>& coefficients) const {
        const float by[] = {loss_.by.g, loss_.by.h, loss_.by.zeta, loss_.by.s};
#pragma unroll
        for (int i = 0; i < 4; ++i) coefficients.at(row_, i) = by[i];
    }

    __device__ __forceinline__ void send(const CoefficientsTable<const float>& coefficients, float upstream,
                                         Shared& shared, int& turn) {
        const auto coefficient = [&](int i) { return times(coefficients.at(row_, i), upstream); };
        loss_.by = {coefficient(0), coefficient(1), coefficient(2), coefficient(3)};
        if (idle()) return;
        softmax_ = softmax();
        sum_targets(shared, turn);
        // A target outside [0, V), even if the coefficients, which may come from elsewhere, are numbers.
        if (sums_.logp != sums_.logp) loss_.by.g = NAN;
    }

    __device__ __forceinline__ bool idle() const { return loss_.by.none(); }

    // e_j (constant + slope d_j) + offset, where d_j is in units of the exponent, times dz_j/dlogits_j.
    template <template <class> class Exponent, Seen seen = Seen::logit>
    __device__ __forceinline__ auto dense() const {
        const Z by = z;
        const Exponent<Z> exponent(z, raw_top());
        const Dense d = dense_gradient(loss_.by, sums_.whole, softmax_);
        const float inverse_t = z.inverse_temperature(), factor = inverse_t * exponent.correction();
        const float slope = factor * kLn2 * d.slope, offset = inverse_t * d.offset;
        const float constant = factor * d.constant - times(slope, exponent.excess());
        const auto by_level = [=](auto level) {
            using X = decltype(level);
            const X of_e = Z::finite(exponent(level));
            const X share = multiply_add(of_e, all_of<X>(slope), all_of<X>(constant));
            return multiply_add(exp2_approx(of_e), share, all_of<X>(offset));
        };
        if constexpr (!Z::kCostly) {
            return [=](float x) { return by_level(x); };
        } else if constexpr (seen == Seen::logit) {
            return [=](float x) {
                const typename Z::Squashed at = by.squashed(x);
                return Z::sloped(by_level(at.level), at);
            };
        } else {
            return [=](float2 x) {
                float2 level = x;
                if constexpr (seen == Seen::cheap_logit) level = by.cheap_level(x);
                return Z::cheap_sloped(by_level(level), level);
            };
        }
    }

    // As PlainRow's. Several targets' elements are written after all others are; a team of several has one target.
    template <class T, class Span>
    __device__ __forceinline__ void write_targets(T* grad, const Span& span, int element) const {
        if (single()) {
            if (element >= 0 && static_cast<int>(threadIdx.x) == span.owner(element))
                assign(grad[element], target_element(0, share(0)));
            return;
        }
        __syncthreads();  // else the thread that owns the element may write it after this one
        for (int k = threadIdx.x; k < num(); k += blockDim.x) {
            const int target = index(k);
            if (target < 0 || share(k) == 0.f) continue;
            float shares = 0.f;
            bool written = false;  // by the thread that has the same target before
#pragma unroll 4
            for (int i = 0; i < num(); ++i) {
                const float of_it = index(i) == target ? share(i) : 0.f;
                shares += of_it;
                written |= i < k && of_it != 0.f;
            }
            if (!written) assign(grad[target], target_element(k, shares));
        }
    }

  private:
    __device__ __forceinline__ bool single() const { return targets_.single(); }
    __device__ __forceinline__ int num() const { return static_cast<int>(targets_.num); }
    __device__ __forceinline__ int index(int k) const {
        return target_index(targets_, aim_ * targets_.num + k, vocab_);
    }
    __device__ __forceinline__ float share(int k) const { return targets_.share(aim_, k); }
    __device__ __forceinline__ float logit(int k) const { return single() ? target_ : logits_[k * n_]; }
    __device__ __forceinline__ float raw_top() const { return single() ? fmaxf(maximum_, target_) : maximum_; }

    __device__ __forceinline__ Softmax softmax() const {
        return single() ? softmax_of(distance_from(maximum_, target_, z), sum_, moment_)
                        : softmax_of_several(sum_, moment_);
    }
    __device__ __forceinline__ TargetSeen target(int k) const {
        return single() ? target_seen(softmax_)
                        : target_seen_of_several(softmax_, distance_from(maximum_, logit(k), z));
    }
    // shares: of all targets that are this one's element.
    __device__ __forceinline__ float target_element(int k, float shares) const {
        const float dz = target_gradient(loss_.by, shares, sums_.whole, target(k), softmax_.mean());
        return z.sloped(z.inverse_temperature() * dz, logit(k));
    }

    __device__ __forceinline__ TargetSums sum_targets(int first, int step) const {
        TargetSums sums;
        for (int k = first; k < num(); k += step) sums.add(share(k), target(k).logp);
        return sums;
    }
    __device__ __forceinline__ void sum_targets(Shared& shared, int& turn) {
        sums_ = single() ? sum_targets(0, 1)
                         : block_reduce(shared.targets, turn, sum_targets(threadIdx.x, blockDim.x), TargetSums{},
                                        [](const TargetSums& x, bool few) { return warp_sum(x, few); });
    }
    template <class Problem>
    __device__ __forceinline__ void evaluate_sums(const Problem& problem, float denominator) {
        const RowSeen seen =
            row_seen(z.level(raw_top()) * z.scale, softmax_, sums_.logp, sums_.whole, drift_, problem.vocab);
        loss_ = terms_loss(problem, token_, aim_, seen, denominator);
    }

    const Aims& targets_;
    const float* const logits_;  // from this row on
    const int64_t token_, aim_, row_, n_;
    const int vocab_;
    float maximum_ = 0.f, sum_ = 0.f, target_ = 0.f, moment_ = 0.f, drift_ = 0.f, squares_ = 0.f;
    bool top1_ = false;
    Softmax softmax_{};
    TargetSums sums_;
    TokenLoss loss_{};
};

// Of stages 1 and 2, with one target.
template <class Z>
using StatisticsRow = TermsRow<Z, Targets, MomentsAndSquares>;

}  // namespace fused_losses
