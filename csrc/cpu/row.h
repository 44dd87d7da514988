// What the CPU does with one row. Overloads by element type; vocab.cpp compiles each for several instruction sets.
#pragma once

#include "../row.h"
#include "simd.h"

namespace fused_losses {
namespace cpu {

// A row is walked in blocks: short enough that the exponentials run on L1 while the next block comes from memory.
constexpr int64_t kBlock = 512;

struct Sum {
    float max;    // of the logits, at least -FLT_MAX, so that a row of -inf gives 0 / 0 and not inf - inf everywhere
    float value;  // sum_j exp2((logits_j - max) * c)
};

// exps_j = exp2((logits_j - references[j / kBlock]) * c), where a block's reference is the maximum up to its end. One
// read of the logits, one exponential per element; scaling a block by exp2((reference - max) * c) completes it.
// exps may be the logits themselves.
Sum exponentials(const float* logits, int64_t vocab, float c, float* exps, float* references);
Sum exponentials(const BFloat16* logits, int64_t vocab, float c, float* exps, float* references);
Sum exponentials(const Float16* logits, int64_t vocab, float c, float* exps, float* references);

// The same sum without keeping the exponentials.
Sum sum_of_exponentials(const float* logits, int64_t vocab, float c);
Sum sum_of_exponentials(const BFloat16* logits, int64_t vocab, float c);
Sum sum_of_exponentials(const Float16* logits, int64_t vocab, float c);

// grad_j = factor * exps_j, completed block by block.
void write_scaled(const float* exps, const float* references, Sum sum, int64_t vocab, float c, float factor,
                  float* grad);
void write_scaled(const float* exps, const float* references, Sum sum, int64_t vocab, float c, float factor,
                  BFloat16* grad);
void write_scaled(const float* exps, const float* references, Sum sum, int64_t vocab, float c, float factor,
                  Float16* grad);

// grad_j = factor * exp2((logits_j - max) * c); grad may be the logits.
void write_exponentials(const float* logits, int64_t vocab, float max, float c, float factor, float* grad);
void write_exponentials(const BFloat16* logits, int64_t vocab, float max, float c, float factor, BFloat16* grad);
void write_exponentials(const Float16* logits, int64_t vocab, float max, float c, float factor, Float16* grad);

// grad_j *= factor
void multiply(float* grad, int64_t vocab, float factor);
void multiply(BFloat16* grad, int64_t vocab, float factor);
void multiply(Float16* grad, int64_t vocab, float factor);

}  // namespace cpu
}  // namespace fused_losses
