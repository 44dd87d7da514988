// What the stages work on: rows of logits, per-token columns, and one parameter struct per kernel.
//
// N is the number of tokens (rows), V the vocabulary. Everything crosses from Python as integers and floats, so that
// this code depends on no torch header and on no torch ABI. The structs are trivially copyable: CUDA passes them by
// value.
#pragma once

#include <stdint.h>

#include "objectives.h"

namespace fused_losses {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// A matrix of N rows whose last dimension is contiguous. Two levels of strides, so that logits[:, :-1] of a
// (B, T, V) tensor is read where it lies.
struct Rows {
    void* data;
    int64_t n;             // N
    int64_t inner;         // rows per outer step; row r is at (r / inner) * outer_stride + (r % inner) * inner_stride
    int64_t outer_stride;  // elements
    int64_t inner_stride;  // elements

    FL_HD int64_t offset(int64_t row) const {  // int64: N * V passes 2^31
        return (row / inner) * outer_stride + (row % inner) * inner_stride;
    }
};

// A per-token float: a strided array (stride 0 broadcasts), or one value for all tokens.
struct Column {
    const float* data;  // (N,), or null: value
    int64_t stride;
    float value;

    FL_HD float at(int64_t row) const { return data ? data[row * stride] : value; }
};

struct Targets {
    const void* data;  // (N, K) contiguous
    bool is_int64;
    int64_t ignore_index;
    int64_t num;  // K; 1 without terms

    FL_HD int64_t at(int64_t i) const {
        return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
    FL_HD int64_t at(int64_t row, int64_t k) const { return at(row * num + k); }
    FL_HD bool ignored(int64_t row) const {
        for (int64_t k = 0; k < num; ++k)
            if (at(row, k) != ignore_index) return false;
        return true;
    }
};

// 1 / temperature; a temperature that is not positive makes its row NaN instead of silently reversing it.
FL_HD float inverse_temperature(const Column& temperature, int64_t row) {
    const float t = temperature.at(row);
    return t > 0.f ? 1.f / t : NAN;
}

struct RowLoss {
    float value;        // weight * loss; exactly 0 for an inactive token
    float coefficient;  // weight * dloss/dlogp / denominator; exactly 0 for an inactive token
};

// The middle stage: what one token does with the three numbers it saw of the vocabulary. A token whose target is
// ignored or whose weight is 0 is inactive: select, never multiply, so that NaN and inf in it stay there.
struct Tokens {
    Targets targets;
    Objective objective;
    int num_inputs;
    Column inputs[kMaxInputs];  // those left out at the end are +inf
    Column weights;

    FL_HD bool active(int64_t row) const { return !targets.ignored(row) && weights.at(row) != 0.f; }

    FL_HD Loss objective_of(int64_t row, float logp) const {
        if (logp != logp) return {NAN, NAN};  // a NaN row, an all -inf row, or a target outside [0, V)
        float in[kMaxInputs];
        for (int i = 0; i < kMaxInputs; ++i) in[i] = i < num_inputs ? inputs[i].at(row) : INFINITY;
        return evaluate(objective, logp, in);
    }

    FL_HD RowLoss loss(int64_t row, float logp, float denominator) const {
        if (!active(row)) return {0.f, 0.f};
        const Loss loss = objective_of(row, logp);
        const float weight = weights.at(row);
        // g == 0 (a clipped token) must survive an infinite weight / denominator
        return {weight * loss.value, loss.g == 0.f ? 0.f : loss.g * (weight / denominator)};
    }
};

// ---- Terms: what a token's loss may hold beside its objective ------------------------------------------------------
//
// fused_losses/terms.py has the formulas. With z = softcap tanh(logits / softcap) / temperature a row shows
// x = sum_k share_k (z_tk - lse), lse, the entropy H and zbar = mean_j z_j, and gets back the loss's derivatives by
// them:
//
//     dloss/dz_j = g (share_j - U p_j) + p_j (zeta - h (z_j - sum_i p_i z_i)) + s / V,    U = sum_k share_k

enum class Kl : int { none = -1, k1 = 0, k2 = 1, k3 = 2, abs = 3 };  // KL_TYPES in terms.py

struct Terms {
    float softcap;  // of the raw logits; 0: none
    bool entropy;   // H is asked for, as an output or because it has a coefficient
    float label_smoothing;
    float z_loss;
    const float* shares;  // (N, K), 0 where a target does not count; or null: K is 1 and its share 1
    Column importance_weights;
    Column ref_logprobs;
    Column kl_coef;
    Column entropy_coef;
    Column log_ratio_clamp;  // of the ratio that weights the KL
    Kl kl_type;
    bool kl_weighted_by_ratio;

    FL_HD float share(int64_t i) const { return shares ? shares[i] : 1.f; }  // i = row * K + k
};

struct RowSeen {
    float logp;   // x
    float total;  // U
    float lse;
    float entropy;  // 0 unless terms.entropy
    float spread;   // lse - zbar; 0 unless labels are smoothed
};

// The derivatives by x, H, lse and zbar, each times weight / denominator. All 0: the row's gradient is 0.
struct Coefficients {
    float g, h, zeta, s;

    FL_HD bool none() const { return g == 0.f && h == 0.f && zeta == 0.f && s == 0.f; }
};

struct TermsLoss {
    float value;
    Coefficients by;
};

// 0 times what is not finite is 0: a coefficient of 0 takes its term out.
FL_HD float times(float a, float b) { return a == 0.f || b == 0.f ? 0.f : a * b; }

// a derivative of 0 must survive an infinite weight / denominator
FL_HD float scaled(float derivative, float factor) { return derivative == 0.f ? 0.f : derivative * factor; }

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

FL_HD TermsLoss terms_loss(const Tokens& tokens, const Terms& terms, int64_t row, const RowSeen& seen,
                           float denominator) {
    if (!tokens.active(row)) return {0.f, {0.f, 0.f, 0.f, 0.f}};
    if (seen.logp != seen.logp) return {NAN, {NAN, NAN, NAN, NAN}};
    Loss loss = tokens.objective_of(row, seen.logp);
    const float importance = terms.importance_weights.at(row);
    loss = {times(importance, loss.value), times(importance, loss.g)};
    if (terms.kl_type != Kl::none) {
        const Penalty penalty = kl(terms.kl_type, seen.logp, terms.ref_logprobs.at(row));
        Loss added = {penalty.value, penalty.slope};
        if (terms.kl_weighted_by_ratio) {
            const LogRatio log_r = log_ratio(seen.logp, tokens.inputs[0].at(row), terms.log_ratio_clamp.at(row));
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
        loss.value = times(1.f - e, loss.value) + e * seen.total * seen.spread;
        by.g *= 1.f - e;
        by.zeta += e * seen.total;
        by.s -= e * seen.total;
    }
    if (terms.z_loss != 0.f) {
        loss.value += terms.z_loss * seen.total * seen.lse * seen.lse;
        by.zeta += 2.f * terms.z_loss * seen.total * seen.lse;
    }
    const float weight = tokens.weights.at(row), factor = weight / denominator;
    return {weight * loss.value,
            {scaled(by.g, factor), scaled(by.h, factor), scaled(by.zeta, factor), scaled(by.s, factor)}};
}

// The reduced loss. No active token means 0 whatever the denominator; a denominator of 0 elsewhere shows as inf.
FL_HD float reduced_loss(double total, float denominator) {
    return total == 0.0 && denominator == 0.f ? 0.f : static_cast<float>(total / denominator);
}

// One pass: stats, objective and gradient of a row while it is on chip. grad may be logits (in place).
struct LossAndGradParams {
    Rows logits;  // (N, V)
    Rows grad;    // (N, V), the dtype of logits
    DType dtype;
    int64_t vocab;  // V
    Tokens tokens;
    Column temperature;
    Column denominator;  // read at row 0; unused when mean
    bool mean;           // the denominator is the sum of the active tokens' weights
    bool all_logprobs;   // read tokens of weight 0 too, for their logprob
    float* logprobs;     // (N,), with terms (K + 1, N): of each target, then H; 0 where the logits were not read
    float* row_losses;   // (N + 1,) scratch: weight * loss per token, then the denominator in use
    float* loss;         // (1,)
};

// Stage 1: per row the maximum of the logits, sum_j exp((logits_j - max) / temperature) and the target's logit.
// logsumexp and logp follow from them without losing the digits that a large common offset takes from lse.
struct StatsParams {
    Rows logits;
    DType dtype;
    int64_t vocab;
    Targets targets;
    Column weights;
    Column temperature;
    bool all_logprobs;
    float* stats;  // (3, N): max, sum, target logit (NaN if the target is outside [0, V));
                   // 0, 1, 0 where the token's logits were not read.
                   // With terms (K + 4, N): K target logits, then sum_j e^(z_j - z_max) (z_j - z_max), 0 unless
                   // terms.entropy, and mean_j z_j - z_max, 0 unless labels are smoothed
};

// Stage 2: losses, logprobs and gradient coefficients from stats; sees N only.
struct ObjectiveParams {
    const float* stats;  // as above
    int64_t n;
    Tokens tokens;
    Column temperature;
    Column denominator;
    bool mean;
    float* logprobs;      // (N,), with terms (K + 1, N)
    float* row_losses;    // (N + 1,): weight * loss per token, then the denominator in use
    float* coefficients;  // (N,), with terms (4, N): by logp, H, lse, zbar
    float* loss;          // (1,), or null: no reduction and denominator 1
};

// Stage 3: grad_j = c / T ([j == target] - p_j), c = coefficient * upstream; a row where either is 0 is zero and its
// logits are not read.
struct GradParams {
    Rows logits;
    Rows grad;
    DType dtype;
    int64_t vocab;
    Targets targets;
    Column temperature;
    Column coefficients;  // with terms (4, N), contiguous
    Column upstream;
    const float* stats;  // as above
};

// grad *= scale, without touching memory when scale is 1.
struct ScaleParams {
    Rows grad;
    DType dtype;
    int64_t vocab;
    const float* scale;  // (1,)
};

}  // namespace fused_losses
