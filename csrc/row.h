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
    const void* data;  // (N,) contiguous
    bool is_int64;
    int64_t ignore_index;

    FL_HD int64_t at(int64_t row) const {
        return is_int64 ? static_cast<const int64_t*>(data)[row] : static_cast<const int32_t*>(data)[row];
    }
    FL_HD bool ignored(int64_t row) const { return at(row) == ignore_index; }
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
    Column inputs[kMaxInputs];
    Column weights;

    FL_HD bool active(int64_t row) const { return !targets.ignored(row) && weights.at(row) != 0.f; }

    FL_HD RowLoss loss(int64_t row, float logp, float denominator) const {
        if (!active(row)) return {0.f, 0.f};
        if (logp != logp) return {NAN, NAN};  // a NaN row, an all -inf row, or a target outside [0, V)
        float in[kMaxInputs];
        for (int i = 0; i < kMaxInputs; ++i) in[i] = i < num_inputs ? inputs[i].at(row) : 0.f;
        const Loss loss = evaluate(objective, logp, in);
        const float weight = weights.at(row);
        // g == 0 (a clipped token) must survive an infinite weight / denominator
        return {weight * loss.value, loss.g == 0.f ? 0.f : loss.g * (weight / denominator)};
    }
};

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
    float* logprobs;     // (N,); 0 where the token's logits were not read
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
                   // 0, 1, 0 where the token's logits were not read
};

// Stage 2: losses, logprobs and gradient coefficients from stats; sees N only.
struct ObjectiveParams {
    const float* stats;  // (3, N)
    int64_t n;
    Tokens tokens;
    Column temperature;
    Column denominator;
    bool mean;
    float* logprobs;      // (N,)
    float* row_losses;    // (N + 1,): weight * loss per token, then the denominator in use
    float* coefficients;  // (N,)
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
    Column coefficients;
    Column upstream;
    const float* stats;  // (3, N)
};

// grad *= scale, without touching memory when scale is 1.
struct ScaleParams {
    Rows grad;
    DType dtype;
    int64_t vocab;
    const float* scale;  // (1,)
};

}  // namespace fused_losses
