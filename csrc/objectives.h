// The per-token losses: the only code that knows which loss is running.
//
// An objective maps logp, the logprob of the target token under the policy being trained, and the token's inputs to
// the loss and to g = dloss/dlogp. It runs once per row in float32; the vocabulary-sized stages never see it.
// logp is in [-inf, 0], never NaN: a NaN row is NaN whatever its loss (loss.h).
// One file serves the CPU loops, the CUDA kernels and the host tests of device code.
//
// To add a loss: write its function below, and add its name and those of its inputs to FL_OBJECTIVES. Limits that a
// call leaves out are +inf.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define FL_HD __host__ __device__ __forceinline__
#else
#define FL_HD inline
#endif

namespace fused_losses {

constexpr int kMaxInputs = 7;

struct Loss {
    float value;
    float g;  // dloss/dlogp
};

// A zero advantage makes value and gradient zero whatever the ratio is (0 * inf would be NaN), but it must not hide
// a NaN in the sampling policy's logprob.
FL_HD bool no_advantage(float old_logprob, float advantage) { return advantage == 0.f && old_logprob == old_logprob; }

FL_HD bool valid_clip(float low, float high) { return low >= 0.f && low <= high; }  // false for NaN, too

// logp - old_logprob within [-clamp, clamp], and whether a gradient flows through it. NaN stays NaN.
struct LogRatio {
    float value;
    bool flows;
};

FL_HD LogRatio log_ratio(float logp, float old_logprob, float clamp) {
    const float raw = logp - old_logprob;
    if (raw > clamp) return {clamp, false};
    if (raw < -clamp) return {-clamp, false};
    return {raw, true};
}

FL_HD Loss logprobs(float logp, const float*) { return {logp, 1.f}; }

FL_HD Loss cross_entropy(float logp, const float*) { return {-logp, -1.f}; }

// g * logp, g a constant; 0 where that is: a ratio or a probability of 0 comes with logp -inf.
FL_HD Loss linear(float g, float logp) { return {g == 0.f ? 0.f : g * logp, g}; }

FL_HD Loss dft(float logp, const float*) { return linear(-expf(logp), logp); }

FL_HD Loss reinforce(float logp, const float* in) { return linear(-in[0], logp); }

FL_HD Loss importance_sampling(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], clamp = in[2];
    if (!(clamp >= 0.f)) return {NAN, NAN};
    if (no_advantage(old_logprob, advantage)) return {0.f, 0.f};
    const LogRatio log_r = log_ratio(logp, old_logprob, clamp);
    const float value = -expf(log_r.value) * advantage;
    return {value, log_r.flows ? value : 0.f};
}

// max(-min(r, delta) A, -clamp(r, low, high) A), at most -dual_clip A for A < 0: in effect one clamp per sign.
FL_HD Loss ppo(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], low = in[2], high = in[3];
    const float clamp = in[4], dual_clip = in[5], delta = in[6];
    if (!(valid_clip(low, high) && clamp >= 0.f && dual_clip >= 0.f && delta >= 0.f)) return {NAN, NAN};
    if (no_advantage(old_logprob, advantage)) return {0.f, 0.f};
    const LogRatio log_r = log_ratio(logp, old_logprob, clamp);
    const float ratio = expf(log_r.value);
    const float ceiling = advantage > 0.f ? fminf(high, delta) : fminf(fmaxf(high, delta), dual_clip);
    if (advantage < 0.f && ratio < low) return {-fminf(low, ceiling) * advantage, 0.f};
    if (advantage == advantage && ratio > ceiling) return {-ceiling * advantage, 0.f};
    const float value = -ratio * advantage;
    return {value, log_r.flows ? value : 0.f};
}

FL_HD Loss cispo(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], low = in[2], high = in[3], clamp = in[4];
    if (!(valid_clip(low, high) && clamp >= 0.f)) return {NAN, NAN};
    if (no_advantage(old_logprob, advantage)) return {0.f, 0.f};
    const float ratio = expf(log_ratio(logp, old_logprob, clamp).value);
    const float clipped = ratio < low ? low : (ratio > high ? high : ratio);  // a NaN ratio stays NaN
    return linear(-clipped * advantage, logp);
}

FL_HD Loss dro(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], beta = in[2], clamp = in[3];
    if (!(beta >= 0.f && clamp >= 0.f)) return {NAN, NAN};
    const LogRatio log_r = log_ratio(logp, old_logprob, clamp);
    const float reward = advantage == 0.f ? 0.f : logp * advantage;
    return {0.5f * beta * log_r.value * log_r.value - reward, (log_r.flows ? beta * log_r.value : 0.f) - advantage};
}

// -(4 / tau) sigmoid(u) A, u = tau (r - 1). From u = 104 on 1 - s is 0 in float32, and 4 s (1 - s) r A would be 0 * inf
// where r overflows.
FL_HD Loss sapo(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], clamp = in[4];
    const float tau = advantage > 0.f ? in[2] : in[3];
    if (!(in[2] > 0.f && in[3] > 0.f && clamp >= 0.f)) return {NAN, NAN};
    if (no_advantage(old_logprob, advantage)) return {0.f, 0.f};
    const LogRatio log_r = log_ratio(logp, old_logprob, clamp);
    const float ratio = expf(log_r.value), u = tau * (ratio - 1.f);
    if (u > 104.f) return {-4.f / tau * advantage, 0.f};
    const float e = expf(-fabsf(u)), larger = 1.f / (1.f + e), smaller = e * larger;  // of s and 1 - s
    const float s = u == u ? (u > 0.f ? larger : smaller) : NAN;
    return {-4.f / tau * s * advantage, log_r.flows ? -4.f * larger * smaller * ratio * advantage : 0.f};
}

// -sg(min(r, cap)) logp A; 0 where the advantage would drive the token on, out of the region.
FL_HD Loss in_trust_region(float divergence, float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], low = in[2], high = in[3], clamp = in[4], cap = in[5];
    if (!(low >= 0.f && high >= 0.f && clamp >= 0.f && cap >= 0.f)) return {NAN, NAN};
    if (no_advantage(old_logprob, advantage)) return {0.f, 0.f};
    if (advantage > 0.f && logp > old_logprob && divergence > high) return {0.f, 0.f};
    if (advantage < 0.f && logp < old_logprob && divergence > low) return {0.f, 0.f};
    const float ratio = expf(log_ratio(logp, old_logprob, clamp).value);
    return linear(-(ratio > cap ? cap : ratio) * advantage, logp);  // a NaN ratio stays NaN
}

FL_HD Loss dppo_tv(float logp, const float* in) { return in_trust_region(fabsf(expf(logp) - expf(in[0])), logp, in); }

// 1 - exp(logp), at least 0, with all its digits.
FL_HD float others_of(float logp) { return fmaxf(-expm1f(logp), 0.f); }

// KL of "this token or any other" under two policies, as frameworks form it: finite where logp is 0.
FL_HD Loss dppo_kl(float logp, const float* in) {
    const float old_logprob = in[0], floor = 1e-8f;
    const float p = expf(old_logprob), others = others_of(old_logprob);
    const float drift = p == 0.f ? 0.f : p * (old_logprob - logp);
    return in_trust_region(drift + others * logf((others + floor) / (others_of(logp) + floor)), logp, in);
}

// Each with its inputs, by the names and in the order of fused_losses/objectives.py: compared when a module is loaded.
// clang-format off
#define FL_OBJECTIVES(apply)                                                                                         \
    apply(logprobs)                                                                                                  \
    apply(cross_entropy)                                                                                             \
    apply(importance_sampling, old_logprobs, advantages, log_ratio_clamp)                                            \
    apply(ppo, old_logprobs, advantages, clip_low_threshold, clip_high_threshold, log_ratio_clamp, dual_clip, delta) \
    apply(cispo, old_logprobs, advantages, clip_low_threshold, clip_high_threshold, log_ratio_clamp)                 \
    apply(dro, old_logprobs, advantages, beta, log_ratio_clamp)                                                      \
    apply(sapo, old_logprobs, advantages, tau_positive, tau_negative, log_ratio_clamp)                               \
    apply(dft)                                                                                                       \
    apply(reinforce, advantages)                                                                                     \
    apply(dppo_tv, old_logprobs, advantages, divergence_low, divergence_high, log_ratio_clamp, ratio_cap)            \
    apply(dppo_kl, old_logprobs, advantages, divergence_low, divergence_high, log_ratio_clamp, ratio_cap)
// clang-format on

enum class Objective : int {
#define FL_ENUMERATOR(name, ...) name,
    FL_OBJECTIVES(FL_ENUMERATOR)
#undef FL_ENUMERATOR
};

FL_HD Loss evaluate(Objective objective, float logp, const float* in) {
    switch (objective) {
#define FL_CASE(name, ...) \
    case Objective::name: return name(logp, in);
        FL_OBJECTIVES(FL_CASE)
#undef FL_CASE
    }
    return {NAN, NAN};
}

}  // namespace fused_losses
