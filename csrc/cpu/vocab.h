// What the CPU does with one row of logits. vocab.cpp is compiled once for each instruction set, into a table of
// functions each, and launch.cpp picks the table that fits the machine. This header and simd.h must stay free of
// functions that are merely inline: of those the linker keeps one copy, and it could be the AVX-512 one.
#pragma once

#include <stdint.h>

namespace fused_losses {
namespace cpu {

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// A row is walked in blocks: short enough that the exponentials run on L1 while the next block comes from memory.
constexpr int64_t kBlock = 512;

// Of all elements but the one that is left out, if that index is one of the row's.
struct Sum {
    float max;    // of the logits, at least -FLT_MAX: of a row of -inf the sum is 0, and not inf - inf
    float value;  // sum_j exp2((logits_j - max) * c)
};

constexpr int64_t kNone = -1;  // to leave out

// The same of levels y_j: the logits or, with a softcap, tanh(logit / softcap), so that only differences are multiplied
// by the cap, which is in c. moment = sum_j 2^d_j d_j, d_j = (y_j - y_max) * c. max is that of the raw logits.
struct SumAndMoment {
    Sum sum;
    float moment;
};

// And of the squares sum_j 4^d_j, and the drift sum_j y_j - y_max. The drift leaves out what they leave out, too.
struct SumsOfStatistics {
    Sum sum;
    float moment, squares, drift;
};

// grad_j = (e_j * (constant + slope * d_j) + offset) * (1 or, with a softcap, 1 - y_j^2), e_j = 2^d_j
struct Combination {
    float constant, slope, offset;
};

// What the exponentials of a block are relative to: for each lane its maximum up to the block's end. So many numbers a
// block, of which an instruction set uses as many as it has lanes.
constexpr int64_t kReferences = 16;

// Exponentials of 16-bit logits are kept in multiples of so many.
constexpr int64_t kWhole = 64;

// Where a sweep keeps the exponentials, and what they are relative to; exps null: nowhere.
struct Kept {
    float* exps;
    float* references;
    bool in_cache;  // or going to memory, as the row of a gradient that is not the logits'
};

template <class T>
struct RowFunctions {
    // exps_j = exp2((logits_j - reference) * c): one read of the logits, one exponential per element; scaling a block's
    // lanes by exp2((reference - max) * c) completes it. exps may be float32 logits. What is left out keeps 0.
    Sum (*exponentials)(const T* logits, int64_t vocab, int64_t left_out, float c, Kept kept);

    // grad_j = factor * exps_j, completed block by block; max is any logit that none of the exponentials' exceeds.
    void (*write_scaled)(Kept kept, int64_t vocab, float max, float c, float factor, T* grad);

    // grad_j = factor * exp2((logits_j - max) * c); grad may be the logits.
    void (*write_exponentials)(const T* logits, int64_t vocab, float max, float c, float factor, T* grad);

    // ---- With terms: softcap 0 is none --------------------------------------------------------------------------

    // As exponentials, with the moment; exps is not the logits, and with a softcap null.
    SumAndMoment (*moments)(const T* logits, int64_t vocab, int64_t left_out, float c, float softcap, Kept kept);

    // All that statistics need, in the same sweep.
    SumsOfStatistics (*statistics)(const T* logits, int64_t vocab, int64_t left_out, float c, float softcap);

    // Of the first n logits; -inf of none.
    float (*largest)(const T* logits, int64_t n);

    // sum_j y_j - y_max over all elements
    float (*drift)(const T* logits, int64_t vocab, float max, float softcap);

    // kept by `moments` or `exponentials`; exps null: made from the logits again, as they are with a softcap. grad may
    // be the logits.
    void (*write_combination)(const T* logits, Kept kept, int64_t vocab, float max, float c, float softcap,
                              Combination combination, T* grad);

    // y of one logit, with the bits that the functions above give it, and the last factor of its gradient.
    float (*level)(float logit, float softcap);
    float (*level_slope)(float logit, float softcap);

    // grad_j *= factor
    void (*multiply)(T* grad, int64_t vocab, float factor);

    // One element to and from float32.
    float (*load)(const T* element);
    void (*store)(T* element, float value);
};

struct VocabFunctions {
    RowFunctions<float> float32;
    RowFunctions<BFloat16> bfloat16;
    RowFunctions<Float16> float16;
};

extern const VocabFunctions vocab_baseline;
#if defined(__x86_64__)
extern const VocabFunctions vocab_avx2;    // x86-64-v3
extern const VocabFunctions vocab_avx512;  // x86-64-v4
#endif

}  // namespace cpu
}  // namespace fused_losses
