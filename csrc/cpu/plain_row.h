// A row whose loss sees the logprob of its target alone: what is summed of it, and what is sent back.
#pragma once

#include "row.h"

namespace fused_losses {
namespace cpu {

template <class T>
class PlainRow {
  public:
    PlainRow(const Targets& targets, const Transform& transform, int64_t row)
        : row_(row), target_(targets.at(row)), unit_(transform.inverse_temperature(row)) {}

    // Where one pass keeps the exponentials.
    static Kept keep(const Problem&, const T* logits, T* grad, int64_t vocab) {
        return kept_exponentials(logits, grad, vocab, false);
    }

    void sweep(const Terms&, const T* logits, int64_t vocab, Kept kept) {
        logit_ = target_logit(logits, target_, vocab);  // before an in-place sweep overwrites it
        const Sum others = functions<T>().exponentials(logits, vocab, target_, kLog2e * unit_, kept);
        sum_ = others.value;
        maximum_ = sum_ == 0.f ? logit_ : others.max;
    }

    void store(const StatsTable<float>& stats, const Terms&) const {
        stats.maximum(row_) = maximum_;
        stats.sum(row_) = sum_;
        stats.target(row_) = logit_;
    }

    void load(const StatsTable<const float>& stats) {
        maximum_ = stats.maximum(row_);
        sum_ = stats.sum(row_);
        logit_ = stats.target(row_);
    }

    Softmax softmax() const { return softmax_of(target_distance(logit_, maximum_, unit_), sum_, 0.f); }

    TokenLoss loss(const Problem& problem, const Softmax& softmax, const LogprobsTable& logprobs) const {
        const float logp = softmax.logprob();
        logprobs.target(row_) = logp;
        return plain_loss(problem, row_, logp, problem.denominator.at(0));
    }

    void observe(const Problem&, const StatsTable<const float>&, const Softmax&, const LogprobsTable&) const {}

    // grad may be the logits.
    void write_gradient(const Coefficients& by, const Softmax& softmax, const T* logits, int64_t vocab, Kept kept,
                        T* grad) const {
        const RowFunctions<T>& f = functions<T>();
        const float top = softmax.lead > 0.f ? logit_ : maximum_, c = kLog2e * unit_;
        const float factor = dense_gradient(by, 1.f, softmax).constant * unit_;
        if (kept.exps) {
            f.write_scaled(kept, vocab, top, c, factor, grad);
        } else {
            f.write_exponentials(logits, vocab, top, c, factor, grad);
        }
        store_target(grad, target_, vocab, target_gradient(by, 1.f, 1.f, target_seen(softmax), 0.f) * unit_);
    }

  private:
    int64_t row_, target_;
    float unit_;  // 1 / temperature
    float maximum_, sum_, logit_;
};

}  // namespace cpu
}  // namespace fused_losses
