// FL_VOCAB names the table that this compilation fills: setup.py sets it with the instruction set.
#include <float.h>
#include <math.h>

#include "simd.h"

namespace fused_losses {
namespace cpu {
namespace {

// kGroup vectors at a time, so that the additions of one do not wait for those of the last.
constexpr int64_t kGroup = 4;
constexpr int64_t kStep = kGroup * kLanes;
static_assert(kBlock % kStep == 0, "a block is whole groups");

// Run body(group) on pointers to whole groups. The ragged end of a row goes through a buffer, so that there is one body
// and one rounding; -inf is what neither maximum nor sum sees.
template <class T, class Body>
FL_INLINE void for_each_group(const T* logits, int64_t n, Body body) {
    int64_t j = 0;
    for (; j + kStep <= n; j += kStep) body(logits + j, j, kStep);
    if (j == n) return;
    T padded[kStep];
    for (int64_t i = 0; i < kStep; i += kLanes) store(padded + i, all(-INFINITY));
    memcpy(static_cast<void*>(padded), logits + j, (n - j) * sizeof(T));
    body(padded, j, n - j);
}

// Write whole groups where they fit, else through a buffer.
template <class T, class Value>
FL_INLINE void store_group(T* out, int64_t count, Value value) {
    if (count == kStep) {
        for (int64_t i = 0; i < kStep; i += kLanes) store(out + i, value(i));
        return;
    }
    T padded[kStep];
    for (int64_t i = 0; i < kStep; i += kLanes) store(padded + i, value(i));
    memcpy(static_cast<void*>(out), padded, count * sizeof(T));
}

// The next block, while this one computes: the loop is as long in arithmetic as in memory, and they should overlap.
template <class T>
FL_INLINE void prefetch_group(const T* group) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < kStep; i += kLine) __builtin_prefetch(group + i);
}

template <class T>
FL_INLINE float block_max(const T* logits, int64_t n, float floor) {
    Floats max[kGroup] = {all(floor), all(floor), all(floor), all(floor)};
    for_each_group(logits, n, [&](const T* group, int64_t, int64_t) __attribute__((always_inline)) {
        for (int64_t i = 0; i < kGroup; ++i)
            max[i] = max_of(load(group + i * kLanes), max[i]);  // a NaN shows in the sum
    });
    return max_of(max_of(max_of(max[0], max[1]), max_of(max[2], max[3])));
}

template <bool keep, class T>
FL_INLINE Sum sweep(const T* logits, int64_t vocab, float c, float* exps, float* references) {
    Sum sum = {-FLT_MAX, 0.f};
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        const T* block = logits + begin;
        const float max = block_max(block, n, sum.max);
        Floats total[kGroup] = {};
        for_each_group(block, n, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
            prefetch_group(block + kBlock + j);
            Floats e[kGroup];
            for (int64_t i = 0; i < kGroup; ++i) {
                e[i] = exp2_nonpositive((load(group + i * kLanes) - max) * c);
                total[i] += e[i];
            }
            if (keep)
                store_group(exps + begin + j, count,
                            [&](int64_t i) __attribute__((always_inline)) { return e[i / kLanes]; });
        });
        if (max > sum.max) sum.value *= exp2_nonpositive((sum.max - max) * c);
        sum.max = max;
        sum.value += sum_of((total[0] + total[1]) + (total[2] + total[3]));
        if (keep) references[begin / kBlock] = max;
    }
    return sum;
}

template <class T>
void scaled(const float* exps, const float* references, Sum sum, int64_t vocab, float c, float factor, T* grad) {
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        const float f = factor * exp2_nonpositive((references[begin / kBlock] - sum.max) * c);
        for_each_group(exps + begin, n,
                       [&](const float* group, int64_t j, int64_t count) __attribute__((always_inline)) {
                           store_group(grad + begin + j, count,
                                       [&](int64_t i) __attribute__((always_inline)) { return f * load(group + i); });
                       });
    }
}

template <class T>
void exponentials_scaled(const T* logits, int64_t vocab, float max, float c, float factor, T* grad) {
    for_each_group(logits, vocab, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
        store_group(grad + j, count, [&](int64_t i) __attribute__((always_inline)) {
            return factor * exp2_nonpositive((load(group + i) - max) * c);
        });
    });
}

template <class T>
void scaled_in_place(T* grad, int64_t vocab, float factor) {
    for_each_group(grad, vocab, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
        store_group(grad + j, count, [&](int64_t i) __attribute__((always_inline)) {
            const Floats x = load(group + i);
            return x == 0.f ? x : factor * x;  // a masked token's gradient stays 0 for an infinite factor, too
        });
    });
}

template <class T>
struct Row {
    static Sum exponentials(const T* logits, int64_t vocab, float c, float* exps, float* references) {
        return sweep<true>(logits, vocab, c, exps, references);
    }
    static Sum sum_of_exponentials(const T* logits, int64_t vocab, float c) {
        return sweep<false>(logits, vocab, c, static_cast<float*>(nullptr), static_cast<float*>(nullptr));
    }
    static float load_one(const T* element) {
        T padded[kLanes] = {*element};
        return load(padded)[0];
    }
    static void store_one(T* element, float value) {
        T padded[kLanes];
        store(padded, all(value));
        *element = padded[0];
    }
    static constexpr RowFunctions<T> functions() {
        return {exponentials, sum_of_exponentials, scaled, exponentials_scaled, scaled_in_place, load_one, store_one};
    }
};

}  // namespace

const VocabFunctions FL_VOCAB = {Row<float>::functions(), Row<BFloat16>::functions(), Row<Float16>::functions()};

}  // namespace cpu
}  // namespace fused_losses
