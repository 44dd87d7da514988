// The per-token losses: the only code that knows which loss is running.
//
// An objective maps logp, the logprob of the target token under the policy being trained, and the token's inputs to
// the loss and to g = dloss/dlogp. It runs once per row in float32; the vocabulary-sized stages never see it.
// logp is in [-inf, 0], never NaN: a NaN row is NaN whatever its loss (Tokens::loss in row.h).
// One file serves the CPU loops, the CUDA kernels and the host tests of device code.
//
// To add a loss: write its function below and add its name to FL_OBJECTIVES. The order of the inputs is that of
// fused_losses/objectives.py.
#pragma once

#include <math.h>

#if defined(__CUDACC__)
#define FL_HD __host__ __device__ __forceinline__
#else
#define FL_HD inline
#endif

namespace fused_losses {

constexpr int kMaxInputs = 4;

struct Loss {
    float value;
    float g;  // dloss/dlogp
};

// A zero advantage makes value and gradient zero whatever the ratio is (0 * inf would be NaN), but it must not hide
// a NaN in the sampling policy's logprob.
FL_HD bool no_advantage(float old_logprob, float advantage) { return advantage == 0.f && old_logprob == old_logprob; }

FL_HD bool valid_clip(float low, float high) { return low >= 0.f && low <= high; }  // false for NaN, too

FL_HD Loss logprobs(float logp, const float*) { return {logp, 1.f}; }

FL_HD Loss cross_entropy(float logp, const float*) { return {-logp, -1.f}; }

FL_HD Loss importance_sampling(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1];
    if (no_advantage(old_logprob, advantage)) return {0.f, 0.f};
    const float value = -expf(logp - old_logprob) * advantage;
    return {value, value};
}

FL_HD Loss ppo(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], low = in[2], high = in[3];
    if (!valid_clip(low, high)) return {NAN, NAN};
    if (no_advantage(old_logprob, advantage)) return {0.f, 0.f};
    const float ratio = expf(logp - old_logprob);
    if (advantage > 0.f && ratio > high) return {-high * advantage, 0.f};
    if (advantage < 0.f && ratio < low) return {-low * advantage, 0.f};
    return {-ratio * advantage, -ratio * advantage};
}

FL_HD Loss cispo(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], low = in[2], high = in[3];
    if (!valid_clip(low, high)) return {NAN, NAN};
    if (no_advantage(old_logprob, advantage)) return {0.f, 0.f};
    const float ratio = expf(logp - old_logprob);
    const float clipped = ratio < low ? low : (ratio > high ? high : ratio);  // a NaN ratio stays NaN
    const float g = -clipped * advantage;
    return {g == 0.f ? 0.f : g * logp, g};  // ratio 0 comes with logp -inf
}

FL_HD Loss dro(float logp, const float* in) {
    const float old_logprob = in[0], advantage = in[1], beta = in[2];
    if (!(beta >= 0.f)) return {NAN, NAN};
    const float log_ratio = logp - old_logprob;
    const float reward = advantage == 0.f ? 0.f : logp * advantage;
    return {0.5f * beta * log_ratio * log_ratio - reward, beta * log_ratio - advantage};
}

#define FL_OBJECTIVES(apply) \
    apply(logprobs) apply(cross_entropy) apply(importance_sampling) apply(ppo) apply(cispo) apply(dro)

enum class Objective : int {
#define FL_ENUMERATOR(name) name,
    FL_OBJECTIVES(FL_ENUMERATOR)
#undef FL_ENUMERATOR
};

FL_HD Loss evaluate(Objective objective, float logp, const float* in) {
    switch (objective) {
#define FL_CASE(name) \
    case Objective::name: return name(logp, in);
        FL_OBJECTIVES(FL_CASE)
#undef FL_CASE
    }
    return {NAN, NAN};
}

}  // namespace fused_losses
