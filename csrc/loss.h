// The maths of one token, between what its row shows and what goes back: host and device code of all C++ backends.
#pragma once

#include <float.h>

#include "problem.h"

namespace fused_losses {

// 0 times what is not finite is 0: a coefficient of 0 takes its term out.
FL_HD float times(float a, float b) { return a == 0.f || b == 0.f ? 0.f : a * b; }

// A row's softmax, its single target kept apart from the rest: nothing cancels however sure the row is. With M the
// largest z of the others, S = sum_{j != t} e^(z_j - M) and z_max = max(M, z_t):
//
//     rest = S e^(M - z_max)    own = e^(z_t - z_max)    1 - p_t = rest / (rest + own)
//     logp = z_t - z_max - log(rest + own)
//
// and where the target leads, own is 1 and log(rest + own) = log1p(rest). Of several targets none is kept apart: own is
// 0.
struct Softmax {
    float lead;    // z_max - M
    float behind;  // z_t - z_max
    float rest, own;
    float moment;  // sum_j e^d_j d_j over all elements, d_j = z_j - z_max
    float total;   // sum_j e^d_j
    float log_total;

    FL_HD float mean() const { return moment / total; }  // sum_j p_j d_j
    FL_HD float entropy() const { return log_total - moment / total; }
    FL_HD float logprob() const { return behind - log_total; }
};

// z_t - z(maximum), from logits or levels. What overflows of finite numbers, as over others that are masked by
// -FLT_MAX, is as good as the largest number; a target of +inf is not, and makes its row NaN.
FL_HD float target_distance(float target, float maximum, float scale) {
    const float distance = (target - maximum) * scale;
    return distance == INFINITY && target != INFINITY ? FLT_MAX : distance;
}

// distance: z_t - M. sum, moment: of the others, relative to M. NaN in either, and a target of +inf, come out as NaN.
FL_HD Softmax softmax_of(float distance, float sum, float moment) {
    Softmax out;
    out.lead = fmaxf(distance, 0.f);
    out.behind = distance - out.lead;
    // e^-lead in two steps: only the product may underflow. One of lead and behind is 0.
    const bool leads = out.lead > 0.f;
    const float power = expf(leads ? -0.5f * out.lead : out.behind), half = leads ? power : 1.f;
    out.rest = half * (half * sum);
    out.own = leads ? 1.f + out.behind : power;  // NaN where the target is +inf
    out.moment = times(half, times(half, moment - times(out.lead, sum))) + times(out.own, out.behind);
    out.total = out.rest + out.own;
    out.log_total = out.own == 1.f ? log1pf(out.rest) : logf(out.total);
    return out;
}

FL_HD Softmax softmax_of_several(float sum, float moment) { return {0.f, 0.f, sum, 0.f, moment, sum, logf(sum)}; }

// One target of a row.
struct TargetSeen {
    float distance;  // z_t - z_max
    float p;
    float others;  // 1 - p
    float logp;
};

FL_HD TargetSeen target_seen(const Softmax& softmax) {
    return {softmax.behind, softmax.own / softmax.total, softmax.rest / softmax.total, softmax.logprob()};
}

// distance: z_t - z_max
FL_HD TargetSeen target_seen_of_several(const Softmax& softmax, float distance) {
    const float logp = distance - softmax.log_total;
    return {distance, expf(logp), -expm1f(logp), logp};
}

// dloss/dz_t. share: of all targets that are equal to this one; whole: of all targets. mean: sum_j p_j d_j.
FL_HD float target_gradient(const Coefficients& by, float share, float whole, const TargetSeen& target, float mean) {
    // share - whole p; where p is near 1 and the target has the whole, made of 1 - p
    const float drawn = target.p < 0.5f ? share - whole * target.p : (share - whole) + whole * target.others;
    // p 0 and distance -inf: nothing
    const float away = by.h == 0.f || target.p == 0.f ? 0.f : by.h * (target.distance - mean);
    return by.g * drawn + target.p * (by.zeta - away) + by.s;
}

// What an element that is no target's gets: e_j (constant + slope d_j) + offset, d_j = z_j - z_max, e_j = e^d_j.
struct Dense {
    float constant, slope, offset;
};

FL_HD Dense dense_gradient(const Coefficients& by, float whole, const Softmax& softmax) {
    const float mean = by.h == 0.f ? 0.f : softmax.mean();
    return {(by.zeta - by.g * whole + by.h * mean) / softmax.total, -by.h / softmax.total, by.s};
}

// What the loss of a token sees of its row.
struct RowSeen {
    float logp;   // x = sum_k share_k logp_k
    float whole;  // U = sum_k share_k
    float lse;
    float entropy;
    float spread;  // lse - zbar
};

// z_max: not by way of M + lead, which are large and nearly cancel where M is a mask. drift: sum_j z_j - M over all
// elements. vocab: the number of classes.
FL_HD RowSeen row_seen(float z_max, const Softmax& softmax, float logp, float whole, float drift, int64_t vocab) {
    return {logp, whole, z_max + softmax.log_total, softmax.entropy(),
            softmax.log_total + softmax.lead - drift / static_cast<float>(vocab)};
}

// Of one target. squares: sum_{j != t} e^(2 (z_j - M)); drift, vocab: as above; top1: 1 or 0, of the logits.
FL_HD Statistics statistics_of(float maximum, const Softmax& softmax, float squares, float drift, int64_t vocab,
                               float top1) {
    if (softmax.logprob() != softmax.logprob()) return {NAN, NAN, 0.f};
    // What underflows is nothing beside rest, of which it is the square or less.
    const float others = expf(-2.f * softmax.lead) * squares, own = softmax.own;
    const float log_squares = own == 1.f ? log1pf(others) : logf(others + own * own);
    return {log_squares - 2.f * softmax.log_total, maximum + drift / static_cast<float>(vocab), top1};
}

struct TokenLoss {
    float value;  // weight * loss; exactly 0 for an inactive token
    Coefficients by;
};

template <class Problem>
FL_HD Loss objective_of(const Problem& problem, int64_t row, float logp) {
    if (logp != logp) return {NAN, NAN};  // a NaN row, an all -inf row, or a target outside [0, V)
    float in[kMaxInputs];
    for (int i = 0; i < kMaxInputs; ++i) in[i] = problem.inputs[i].at(row);
    return evaluate(problem.objective, logp, in);
}

// A derivative of 0 (a clipped token) must survive an infinite weight / denominator.
FL_HD float scaled(float derivative, float factor) { return derivative == 0.f ? 0.f : derivative * factor; }

// Of a plain problem, and of a row that was read: only its weight can make it inactive.
template <class Problem>
FL_HD TokenLoss plain_loss(const Problem& problem, int64_t row, float logp, float denominator) {
    const float weight = problem.weights.at(row);
    if (weight == 0.f) return {0.f, {0.f, 0.f, 0.f, 0.f}};
    const Loss loss = objective_of(problem, row, logp);
    return {weight * loss.value, {scaled(loss.g, weight / denominator), 0.f, 0.f, 0.f}};
}

// The estimate of KL, its derivative by logp, and the sum of both: the derivative of ratio * value is ratio * sum. For
// k3 value and slope cancel in it, so it is formed by itself.
struct Penalty {
    float value, slope, sum;
};

FL_HD Penalty kl(Kl type, float logp, float ref_logprob) {
    const float d = logp - ref_logprob;
    if (type == Kl::k3) {
        const float inverse = expf(-d);  // logp -inf: KL is inf, not inf - inf
        return {inverse + (d == -INFINITY ? 0.f : d) - 1.f, 1.f - inverse, d};
    }
    const float value = type == Kl::k1 ? d : type == Kl::k2 ? 0.5f * d * d : fabsf(d);
    const float slope = type == Kl::k1 ? 1.f : type == Kl::k2 ? d : d > 0.f ? 1.f : d < 0.f ? -1.f : d;
    return {value, slope, value + slope};
}

// With terms; aim: as in ProblemOf::active.
//
//     dloss/dz_j = g (share_j - U p_j) + p_j (zeta - h (z_j - sum_i p_i z_i)) + s
template <class Problem>
FL_HD TokenLoss terms_loss(const Problem& problem, int64_t row, int64_t aim, const RowSeen& seen, float denominator) {
    if (!problem.active(row, aim)) return {0.f, {0.f, 0.f, 0.f, 0.f}};
    if (seen.logp != seen.logp) return {NAN, {NAN, NAN, NAN, NAN}};
    const auto& terms = problem.terms;
    Loss loss = objective_of(problem, row, seen.logp);
    const float importance = terms.importance_weights.at(row);
    loss = {times(importance, loss.value), times(importance, loss.g)};
    if (terms.kl_type != Kl::none) {
        const Penalty penalty = kl(terms.kl_type, seen.logp, terms.ref_logprobs.at(row));
        Loss added = {penalty.value, penalty.slope};
        if (terms.kl_weighted_by_ratio) {
            // old_logprobs is the first input of every objective that has a ratio
            const LogRatio log_r = log_ratio(seen.logp, problem.inputs[0].at(row), terms.log_ratio_clamp.at(row));
            const float ratio = expf(log_r.value);
            added = {times(ratio, penalty.value), times(ratio, log_r.flows ? penalty.sum : penalty.slope)};
        }
        const float coefficient = terms.kl_coef.at(row);
        loss.value += times(coefficient, added.value);
        loss.g += times(coefficient, added.g);
    }
    Coefficients by = {loss.g, 0.f, 0.f, 0.f};
    if (terms.entropy) {
        const float coefficient = terms.entropy_coef.at(row);
        loss.value -= times(coefficient, seen.entropy);
        by.h = -coefficient;
    }
    if (terms.label_smoothing != 0.f) {
        const float e = terms.label_smoothing;
        loss.value = times(1.f - e, loss.value) + e * seen.whole * seen.spread;
        by.g *= 1.f - e;
        by.zeta += e * seen.whole;
        by.s -= e * seen.whole / static_cast<float>(problem.vocab);
    }
    if (terms.z_loss != 0.f) {
        loss.value += terms.z_loss * seen.whole * seen.lse * seen.lse;
        by.zeta += 2.f * terms.z_loss * seen.whole * seen.lse;
    }
    const float weight = problem.weights.at(row), factor = weight / denominator;
    return {weight * loss.value,
            {scaled(by.g, factor), scaled(by.h, factor), scaled(by.zeta, factor), scaled(by.s, factor)}};
}

// The reduced loss. No active token means 0 whatever the denominator; a denominator of 0 elsewhere shows as inf.
FL_HD float reduced_loss(double total, float denominator) {
    return total == 0.0 && denominator == 0.f ? 0.f : static_cast<float>(total / denominator);
}

}  // namespace fused_losses
