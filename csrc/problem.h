// What is asked of N rows of logits: the records of fused_losses/problem.py, and one parameter struct per stage.
//
// N is the number of tokens (rows), V the vocabulary, K the number of targets per token. Everything crosses from Python
// as integers and floats, so that this code depends on no torch header and on no torch ABI. The structs are trivially
// copyable: CUDA passes them by value.
#pragma once

#include <stdint.h>

#include "objectives.h"

namespace fused_losses {

enum class DType : int { float32 = 0, bfloat16 = 1, float16 = 2 };

// N rows of V elements whose last dimension is contiguous. Two levels of strides, so that logits[:, :-1] of a (B, T, V)
// tensor is read where it lies.
struct Rows {
    void* data;
    DType dtype;
    int64_t n;             // N
    int64_t vocab;         // V
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
    int64_t num;          // K
    const float* shares;  // (N, K), 0 where a target does not count; or null: K is 1 and its share 1

    FL_HD bool single() const { return num == 1; }
    FL_HD int64_t at(int64_t i) const {
        return is_int64 ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
    }
    FL_HD int64_t at(int64_t row, int64_t k) const { return at(row * num + k); }
    FL_HD float share(int64_t row, int64_t k) const { return shares ? shares[row * num + k] : 1.f; }
    FL_HD bool ignored(int64_t row) const {
        for (int64_t k = 0; k < num; ++k)
            if (at(row, k) != ignore_index) return false;
        return true;
    }
};

// What follows holds a number per token as a Column, or as another type with at(row): where the numbers of a few tokens
// lie at hand (csrc/cuda/token_ring.cuh).

// z = softcap tanh(logits / softcap) / temperature
template <class PerToken>
struct TransformOf {
    PerToken temperature;
    float softcap;  // 0: none

    // 1 / temperature; one that is not positive makes its row NaN instead of silently reversing it.
    FL_HD float inverse_temperature(int64_t row) const {
        const float t = temperature.at(row);
        return t > 0.f ? 1.f / t : NAN;
    }
};
using Transform = TransformOf<Column>;

enum class Kl : int { none = -1, k1 = 0, k2 = 1, k3 = 2, abs = 3 };

// What a token's loss may hold beside its objective; fused_losses/terms.py has the formulas.
template <class PerToken>
struct TermsOf {
    PerToken importance_weights;
    PerToken ref_logprobs;
    PerToken kl_coef;
    PerToken entropy_coef;
    PerToken log_ratio_clamp;  // of the ratio that weights the KL
    float label_smoothing;
    float z_loss;
    Kl kl_type;
    bool kl_weighted_by_ratio;
    bool entropy;     // H is asked for, as an output or because it has a coefficient
    bool statistics;  // all that fused_losses.statistics gives is asked for, of one target; then H is, too
};
using Terms = TermsOf<Column>;

template <class Aims, class PerToken>
struct ProblemOf {
    Aims targets;
    TransformOf<PerToken> transform;
    PerToken weights;
    Objective objective;
    PerToken inputs[kMaxInputs];
    TermsOf<PerToken> terms;
    PerToken denominator;  // read at row 0
    int64_t vocab;         // the number of classes, which the rows at hand need not have all of
    bool all_logprobs;     // read tokens of weight 0 too, for their logprob
    bool plain;            // one target, no softcap, no terms: kernels of their own

    // Of the tables below.
    FL_HD int64_t stats_rows() const { return plain ? 3 : targets.num + (terms.statistics ? 6 : 4); }
    FL_HD int64_t logprobs_rows() const { return plain ? 1 : targets.num + (terms.statistics ? 4 : 1); }

    // A token whose targets are ignored or whose weight is 0 is inactive: select, never multiply, so that NaN and inf
    // in it stay there. row: of the numbers; aim: of the targets, the same but for a few tokens at hand.
    FL_HD bool active(int64_t row, int64_t aim) const { return !targets.ignored(aim) && weights.at(row) != 0.f; }
    FL_HD bool active(int64_t row) const { return active(row, row); }

    // The logits of a token of weight 0 are read only for its logprob, those of an ignored token never. What was not
    // read has logprob 0 and entropy 0.
    FL_HD bool reads(int64_t row, int64_t aim) const {
        return !targets.ignored(aim) && (all_logprobs || weights.at(row) != 0.f);
    }
    FL_HD bool reads(int64_t row) const { return reads(row, row); }
};
using Problem = ProblemOf<Targets, Column>;

// ---- Tables that stages hand on: one column per token, so that neighbours lie side by side -------------------------

// (3, N), where the problem is not plain (K + 4, N), with statistics (K + 6, N). With a single target, its element is
// left out of maximum, sum, moment and squares, so that 1 - p of a sure target is made of what is small (Softmax in
// loss.h). d_j = z_j - z(maximum).
//
//     maximum   of the raw logits, at least -FLT_MAX; of a single target whose row has no other mass, its own logit
//     sum       sum_j e^d_j
//     targets   the raw logits of the K targets; NaN for a target outside [0, V)
//     moment    sum_j e^d_j d_j, 0 unless terms.entropy
//     drift     sum_j d_j over all elements, 0 unless labels are smoothed or terms.statistics
//     squares   sum_j e^(2 d_j)
//     top1      1 where the target's raw logit is the first of the row's largest, else 0
//
// Zeros where the token was not read.
template <class Float>
struct StatsTable {
    Float* data;
    int64_t n;
    int64_t num;  // K

    FL_HD Float& maximum(int64_t row) const { return data[row]; }
    FL_HD Float& sum(int64_t row) const { return data[n + row]; }
    FL_HD Float& target(int64_t row, int64_t k = 0) const { return data[(2 + k) * n + row]; }
    FL_HD Float& moment(int64_t row) const { return data[(2 + num) * n + row]; }
    FL_HD Float& drift(int64_t row) const { return data[(3 + num) * n + row]; }
    FL_HD Float& squares(int64_t row) const { return data[(4 + num) * n + row]; }
    FL_HD Float& top1(int64_t row) const { return data[(5 + num) * n + row]; }
};

// The derivatives by x, H and lse, each times weight / denominator, and that by every z_j alike. All 0: the row's
// gradient is 0.
struct Coefficients {
    float g, h, zeta, s;

    FL_HD bool none() const { return g == 0.f && h == 0.f && zeta == 0.f && s == 0.f; }
};

// (4, N); plain (1, N): g
template <class Float>
struct CoefficientsTable {
    Float* data;
    int64_t n;

    FL_HD Float& at(int64_t row, int i = 0) const { return data[i * n + row]; }  // i: 0 g, 1 h, 2 zeta, 3 s
};

// What statistics add to a token's logprob and H: log sum_j p_j^2, mean_j z_j, and 1 where the target is the first of
// the most likely, else 0.
struct Statistics {
    float log_sum_squares, mean_logit, top1;
};

// (N,); where the problem is not plain (K + 1, N): the logprob of each target, then H; with statistics (K + 4, N),
// these last. 0 where the token was not read.
struct LogprobsTable {
    float* data;
    int64_t n;
    int64_t num;  // K

    FL_HD float& target(int64_t row, int64_t k = 0) const { return data[k * n + row]; }
    FL_HD float& entropy(int64_t row) const { return data[num * n + row]; }
    FL_HD void store(int64_t row, const Statistics& seen) const {
        data[(num + 1) * n + row] = seen.log_sum_squares;
        data[(num + 2) * n + row] = seen.mean_logit;
        data[(num + 3) * n + row] = seen.top1;
    }
};

// ---- One struct per stage ------------------------------------------------------------------------------------------

// What a mean divides by: the sum of the active tokens' weights.
struct NormaliserParams {
    int64_t n;
    Targets targets;
    Column weights;
    float* normaliser;  // (1,)
};

// One pass: stats, objective and gradient of a row while it is on chip. grad may be logits (in place).
struct LossAndGradParams {
    Rows logits;
    Rows grad;  // the shape and the dtype of logits
    Problem problem;
    LogprobsTable logprobs;
    float* row_losses;  // (N,) scratch: weight * loss per token
    float* loss;        // (1,)
    bool averages;      // the denominator is a mean's normaliser, to be formed first, where the loss will be

    NormaliserParams normaliser() const { return {logits.n, problem.targets, problem.weights, loss}; }
};

// Stage 1: what a row shows of the vocabulary.
struct StatsParams {
    Rows logits;
    Problem problem;
    StatsTable<float> stats;
};

// Stage 2: losses, logprobs and coefficients from stats; sees N only.
struct ObjectiveParams {
    int64_t n;
    Problem problem;
    StatsTable<const float> stats;
    LogprobsTable logprobs;
    float* row_losses;  // (N,): weight * loss per token
    CoefficientsTable<float> coefficients;
    float* loss;    // (1,), or null: no reduction and denominator 1
    bool averages;  // as above

    NormaliserParams normaliser() const { return {n, problem.targets, problem.weights, loss}; }
};

// Stage 3: the gradient from stats and coefficients, each times upstream; a row where either is 0 is zero and its
// logits are not read.
struct GradParams {
    Rows logits;
    Rows grad;
    Targets targets;  // ignore_index plays no part: an ignored token has coefficient 0
    Transform transform;
    StatsTable<const float> stats;
    CoefficientsTable<const float> coefficients;
    Column upstream;
    bool plain;
};

// grad *= scale, without touching memory when scale is 1.
struct ScaleParams {
    Rows grad;
    const float* scale;  // (1,)
};

}  // namespace fused_losses
