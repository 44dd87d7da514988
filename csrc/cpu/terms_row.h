// A row with a softcap, several targets, or terms beside its objective: what is summed of it, and what is sent back.
#pragma once

#include <algorithm>

#include "row.h"

namespace fused_losses {
namespace cpu {

// What a row has per target, kept between rows for its memory.
struct TargetScratch {
    std::vector<float> logits;
    std::vector<int64_t> order;
};

inline TargetScratch& target_scratch(int64_t num) {
    static thread_local TargetScratch scratch;
    scratch.logits.resize(num);
    return scratch;
}

// One at a time per thread.
template <class T>
class TermsRow {
  public:
    TermsRow(const Targets& targets, const Transform& transform, int64_t row)
        : targets_(targets),
          row_(row),
          softcap_(transform.softcap),
          unit_(transform.inverse_temperature(row)),
          scale_(softcap_ != 0.f ? softcap_ * unit_ : unit_),
          scratch_(target_scratch(targets.num)) {}

    static Kept keep(const Problem& problem, const T* logits, T* grad, int64_t vocab) {
        // a softcap's tanh is made again, and the exponential with it
        if (problem.transform.softcap != 0.f) return kNothing;
        const bool logits_again = problem.terms.entropy || problem.terms.label_smoothing != 0.f;
        return kept_exponentials(logits, grad, vocab, logits_again);
    }

    void sweep(const Terms& terms, const T* logits, int64_t vocab, Kept kept) {
        const RowFunctions<T>& f = functions<T>();
        for (int64_t k = 0; k < targets_.num; ++k)
            scratch_.logits[k] = target_logit(logits, targets_.at(row_, k), vocab);
        const int64_t left_out = targets_.single() ? targets_.at(row_) : kNone;
        const float c = kLog2e * scale_;
        if (terms.statistics) return sweep_statistics(logits, vocab, left_out, c);
        SumAndMoment seen = {};
        if (terms.entropy || softcap_ != 0.f) {
            seen = f.moments(logits, vocab, left_out, c, softcap_, kept);
        } else {
            seen.sum = f.exponentials(logits, vocab, left_out, c, kept);
        }
        sum_ = seen.sum.value;
        maximum_ = sum_ == 0.f && targets_.single() ? scratch_.logits[0] : seen.sum.max;
        moment_ = terms.entropy ? kLn2 * seen.moment : 0.f;
        drift_ = terms.label_smoothing != 0.f ? f.drift(logits, vocab, maximum_, softcap_) * scale_ : 0.f;
    }

    void store(const StatsTable<float>& stats, const Terms& terms) const {
        stats.maximum(row_) = maximum_;
        stats.sum(row_) = sum_;
        for (int64_t k = 0; k < targets_.num; ++k) stats.target(row_, k) = scratch_.logits[k];
        stats.moment(row_) = moment_;
        stats.drift(row_) = drift_;
        if (!terms.statistics) return;
        stats.squares(row_) = squares_;
        stats.top1(row_) = top1_ ? 1.f : 0.f;
    }

    void load(const StatsTable<const float>& stats) {
        maximum_ = stats.maximum(row_);
        sum_ = stats.sum(row_);
        for (int64_t k = 0; k < targets_.num; ++k) scratch_.logits[k] = stats.target(row_, k);
        moment_ = stats.moment(row_);
        drift_ = stats.drift(row_);
    }

    Softmax softmax() const {
        return targets_.single() ? softmax_of(distance(0), sum_, moment_) : softmax_of_several(sum_, moment_);
    }

    TokenLoss loss(const Problem& problem, const Softmax& softmax, const LogprobsTable& logprobs) const {
        float x = 0.f;
        for (int64_t k = 0; k < targets_.num; ++k) {
            const float share = targets_.share(row_, k);
            const bool counts = share != 0.f;
            const bool ignored = !counts && targets_.at(row_, k) == targets_.ignore_index;
            const float logp = ignored ? 0.f : target(softmax, k).logp;
            logprobs.target(row_, k) = logp;
            if (counts) x += share * logp;
        }
        const float top = level(softmax.lead > 0.f ? scratch_.logits[0] : maximum_);
        const RowSeen seen = row_seen(top * scale_, softmax, x, whole(), drift_, problem.vocab);
        logprobs.entropy(row_) = problem.terms.entropy ? seen.entropy : 0.f;
        return terms_loss(problem, row_, row_, seen, problem.denominator.at(0));
    }

    // What else is asked of it, once it is loaded.
    void observe(const Problem& problem, const StatsTable<const float>& stats, const Softmax& softmax,
                 const LogprobsTable& logprobs) const {
        if (!problem.terms.statistics) return;
        logprobs.store(row_, statistics_of(level(maximum_) * scale_, softmax, stats.squares(row_), drift_,
                                           problem.vocab, stats.top1(row_)));
    }

    // grad may be the logits.
    void write_gradient(const Coefficients& by, const Softmax& softmax, const T* logits, int64_t vocab, Kept kept,
                        T* grad) const {
        const RowFunctions<T>& f = functions<T>();
        const float top = softmax.lead > 0.f ? scratch_.logits[0] : maximum_, c = kLog2e * scale_;
        const Dense dense = dense_gradient(by, whole(), softmax);
        if (kept.exps && dense.slope == 0.f && dense.offset == 0.f) {
            f.write_scaled(kept, vocab, top, c, dense.constant * unit_, grad);
        } else {
            f.write_combination(logits, kept, vocab, top, c, softcap_,
                                {dense.constant * unit_, dense.slope * kLn2 * unit_, dense.offset * unit_}, grad);
        }
        write_targets(by, softmax, vocab, grad);
    }

  private:
    void sweep_statistics(const T* logits, int64_t vocab, int64_t target, float c) {
        const RowFunctions<T>& f = functions<T>();
        const SumsOfStatistics seen = f.statistics(logits, vocab, target, c, softcap_);
        const float own = scratch_.logits[0], rival = seen.sum.max;
        sum_ = seen.sum.value;
        maximum_ = sum_ == 0.f ? own : rival;
        moment_ = kLn2 * seen.moment;
        squares_ = seen.squares;
        const bool here = target >= 0 && target < vocab;  // or another part of the vocabulary has it
        drift_ = seen.drift * scale_ + (here ? distance(0) : 0.f);
        // ties are rare: only then is it looked which of the equal logits is first
        top1_ = own > rival || (own == rival && f.largest(logits, target) < own);
    }

    float level(float logit) const { return functions<T>().level(logit, softcap_); }

    float distance(int64_t k) const { return target_distance(level(scratch_.logits[k]), level(maximum_), scale_); }

    TargetSeen target(const Softmax& softmax, int64_t k) const {
        return targets_.single() ? target_seen(softmax) : target_seen_of_several(softmax, distance(k));
    }

    float whole() const {
        float sum = 0.f;
        for (int64_t k = 0; k < targets_.num; ++k) sum += targets_.share(row_, k);
        return sum;
    }

    // The targets' elements, formed in float32. One of several that does not count keeps what all elements get; a
    // single one was left out of the exponentials, and is written in any case.
    void write_targets(const Coefficients& by, const Softmax& softmax, int64_t vocab, T* grad) const {
        const auto token = [&](int64_t k) { return targets_.at(row_, k); };
        std::vector<int64_t>& order = scratch_.order;  // equal ones side by side
        order.clear();
        for (int64_t k = 0; k < targets_.num; ++k)
            if (targets_.single() || targets_.share(row_, k) != 0.f) order.push_back(k);
        std::sort(order.begin(), order.end(),
                  [&](int64_t a, int64_t b) { return token(a) != token(b) ? token(a) < token(b) : a < b; });
        const float whole = this->whole(), mean = by.h == 0.f ? 0.f : softmax.mean();
        for (size_t i = 0; i < order.size();) {
            const int64_t k = order[i], j = token(k);
            float share = 0.f;
            for (; i < order.size() && token(order[i]) == j; ++i) share += targets_.share(row_, order[i]);
            // nowhere: NaN whatever the coefficients, which need not be ours
            if (scratch_.logits[k] != scratch_.logits[k]) return fill(grad, vocab, NAN);
            const float own = target_gradient(by, share, whole, target(softmax, k), mean);
            store_target(grad, j, vocab, own * unit_ * functions<T>().level_slope(scratch_.logits[k], softcap_));
        }
    }

    static void fill(T* grad, int64_t vocab, float value) {
        for (int64_t j = 0; j < vocab; ++j) functions<T>().store(grad + j, value);
    }

    const Targets& targets_;
    int64_t row_;
    float softcap_;
    float unit_;   // 1 / temperature
    float scale_;  // of a level, which makes z of it
    float maximum_, sum_, moment_, drift_, squares_;
    bool top1_;
    TargetScratch& scratch_;  // the logits of the targets
};

}  // namespace cpu
}  // namespace fused_losses
