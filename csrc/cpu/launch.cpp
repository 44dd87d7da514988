// The stages as loops over rows, shared out among OpenMP's threads (torch's own: its wheel's libgomp is the one that an
// extension imported after torch is bound to). Rows are independent and sums run in one order, so the result does not
// depend on the number of threads.
#include <string.h>

#include <algorithm>
#include <vector>

#include "../row.h"
#include "vocab.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_losses {

void launch(const LossAndGradParams&, uintptr_t);
void launch(const StatsParams&, uintptr_t);
void launch(const ObjectiveParams&, uintptr_t);
void launch(const GradParams&, uintptr_t);
void launch(const ScaleParams&, uintptr_t);

namespace cpu {
namespace {

constexpr float kLog2e = 1.44269504f;
constexpr int64_t kParallelFrom = 1 << 15;  // elements; below, waking a second thread costs more than it saves

const VocabFunctions& vocab_functions() {
#if defined(__x86_64__)
    static const VocabFunctions& best = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                                            ? vocab_avx512
                                        : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                                            ? vocab_avx2
                                            : vocab_baseline;
    return best;
#else
    return vocab_baseline;
#endif
}

template <class T>
const RowFunctions<T>& functions();
template <>
const RowFunctions<float>& functions() {
    return vocab_functions().float32;
}
template <>
const RowFunctions<BFloat16>& functions() {
    return vocab_functions().bfloat16;
}
template <>
const RowFunctions<Float16>& functions() {
    return vocab_functions().float16;
}

// Run body(row) for every row, a few at a time: masked rows are cheap and come in spans.
template <class Body>
void for_each_row(int64_t n, int64_t vocab, Body body) {
    const int64_t chunk = std::max<int64_t>(1, kParallelFrom / std::max<int64_t>(1, vocab));
#pragma omp parallel for schedule(dynamic, chunk) if (n > 1 && n * vocab > kParallelFrom)
    for (int64_t row = 0; row < n; ++row) body(row);
}

template <class Work>
void dispatch(DType dtype, Work work) {
    switch (dtype) {
        case DType::float32: return work(float());
        case DType::bfloat16: return work(BFloat16());
        case DType::float16: return work(Float16());
    }
}

template <class T>
T* row_of(const Rows& rows, int64_t row) {
    return static_cast<T*>(rows.data) + rows.offset(row);
}

// Fresh memory comes in 4 KiB pages, and their faults take longer than the kernel: ask for huge ones.
void expect_huge_pages(const Rows& rows, int64_t vocab, size_t element) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t(1) << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(rows.data) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = reinterpret_cast<uintptr_t>(rows.data) + uintptr_t(rows.n) * vocab * element;
    if (end > begin + kHuge) madvise(reinterpret_cast<void*>(begin), (end - begin) / kHuge * kHuge, MADV_HUGEPAGE);
#endif
}

// A row that was not read (0, 1, 0) must give 0 where its temperature is bad, too; one that was shows it in its sum.
float logprob(float max, float sum, float target_logit, float inverse_temperature) {
    const float distance = target_logit - max;
    return (distance == 0.f ? 0.f : distance * inverse_temperature) - logf(sum);
}

template <class T>
float target_logit(const T* logits, int64_t target, int64_t vocab) {
    return target >= 0 && target < vocab ? functions<T>().load(logits + target) : NAN;
}

float normaliser(const Tokens& tokens, int64_t n) {
    double sum = 0.0;
    for (int64_t row = 0; row < n; ++row) sum += tokens.active(row) ? tokens.weights.at(row) : 0.f;
    return static_cast<float>(sum);
}

void reduce(const float* row_losses, int64_t n, float* loss) {
    double sum = 0.0;
    for (int64_t row = 0; row < n; ++row) sum += row_losses[row];
    *loss = reduced_loss(sum, row_losses[n]);
}

// -coefficient * p_j everywhere, then the target's coefficient * (1 - p_t), formed in float32.
template <class T>
void write_target(T* grad, int64_t target, int64_t vocab, float coefficient, float p_target) {
    if (target >= 0 && target < vocab) functions<T>().store(grad + target, coefficient * (1.f - p_target));
}

float* exponentials_of(float* grad, int64_t) { return grad; }  // float32: the gradient's own row, hot in L2
float* exponentials_of(void*, int64_t vocab) {
    static thread_local std::vector<float> scratch;
    if (scratch.size() < static_cast<size_t>(vocab)) scratch.resize(vocab);
    return scratch.data();
}

template <class T>
void loss_and_grad_row(const LossAndGradParams& p, int64_t row, float denominator) {
    static thread_local std::vector<float> references;
    const T* logits = row_of<T>(p.logits, row);
    T* grad = row_of<T>(p.grad, row);
    const Tokens& tokens = p.tokens;

    if (tokens.targets.ignored(row) || !(p.all_logprobs || tokens.active(row))) {
        p.logprobs[row] = p.row_losses[row] = 0.f;
        memset(static_cast<void*>(grad), 0, p.vocab * sizeof(T));
        return;
    }
    const int64_t target = tokens.targets.at(row);
    const float logit = target_logit(logits, target, p.vocab);  // before an in-place sweep overwrites it
    const float inverse_t = inverse_temperature(p.temperature, row), c = kLog2e * inverse_t;
    float* exps = exponentials_of(grad, p.vocab);
    references.resize((p.vocab + kBlock - 1) / kBlock);
    const Sum sum = functions<T>().exponentials(logits, p.vocab, c, exps, references.data());

    const float logp = logprob(sum.max, sum.value, logit, inverse_t);
    const RowLoss loss = tokens.loss(row, logp, denominator);
    p.logprobs[row] = logp;
    p.row_losses[row] = loss.value;
    if (loss.coefficient == 0.f) {
        memset(static_cast<void*>(grad), 0, p.vocab * sizeof(T));
        return;
    }
    const float coefficient = loss.coefficient * inverse_t;
    functions<T>().write_scaled(exps, references.data(), sum, p.vocab, c, -coefficient / sum.value, grad);
    write_target(grad, target, p.vocab, coefficient, exp2f((logit - sum.max) * c) / sum.value);
}

template <class T>
void stats_row(const StatsParams& p, int64_t row) {
    const int64_t n = p.logits.n;
    Sum sum = {0.f, 1.f};
    float logit = 0.f;
    if (!p.targets.ignored(row) && (p.all_logprobs || p.weights.at(row) != 0.f)) {
        const T* logits = row_of<T>(p.logits, row);
        sum = functions<T>().sum_of_exponentials(logits, p.vocab, kLog2e * inverse_temperature(p.temperature, row));
        logit = target_logit(logits, p.targets.at(row), p.vocab);
    }
    p.stats[row] = sum.max;
    p.stats[n + row] = sum.value;
    p.stats[2 * n + row] = logit;
}

template <class T>
void grad_row(const GradParams& p, int64_t row) {
    const int64_t n = p.logits.n;
    const T* logits = row_of<T>(p.logits, row);
    T* grad = row_of<T>(p.grad, row);
    const float saved = p.coefficients.at(row), upstream = p.upstream.at(row);
    if (saved == 0.f || upstream == 0.f) {
        memset(static_cast<void*>(grad), 0, p.vocab * sizeof(T));
        return;
    }
    const int64_t target = p.targets.at(row);
    const float max = p.stats[row], sum = p.stats[n + row], logit = p.stats[2 * n + row];
    const float inverse_t = inverse_temperature(p.temperature, row), c = kLog2e * inverse_t;
    const float coefficient = saved * upstream * inverse_t;
    functions<T>().write_exponentials(logits, p.vocab, max, c, -coefficient / sum, grad);
    write_target(grad, target, p.vocab, coefficient, exp2f((logit - max) * c) / sum);
}

}  // namespace
}  // namespace cpu

void launch(const LossAndGradParams& p, uintptr_t) {
    const int64_t n = p.logits.n;
    const float denominator = p.mean ? cpu::normaliser(p.tokens, n) : p.denominator.at(0);
    cpu::dispatch(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (p.grad.data != p.logits.data) cpu::expect_huge_pages(p.grad, p.vocab, sizeof(T));
        cpu::for_each_row(n, p.vocab, [&](int64_t row) { cpu::loss_and_grad_row<T>(p, row, denominator); });
    });
    p.row_losses[n] = denominator;
    cpu::reduce(p.row_losses, n, p.loss);
}

void launch(const StatsParams& p, uintptr_t) {
    cpu::dispatch(p.dtype, [&](auto type) {
        cpu::for_each_row(p.logits.n, p.vocab, [&](int64_t row) { cpu::stats_row<decltype(type)>(p, row); });
    });
}

void launch(const ObjectiveParams& p, uintptr_t) {
    const int64_t n = p.n;
    const float denominator = p.mean ? cpu::normaliser(p.tokens, n) : p.denominator.at(0);
    cpu::for_each_row(n, 64, [&](int64_t row) {  // 64: an objective costs about as much as so many logits
        const float inverse_t = inverse_temperature(p.temperature, row);
        const float logp = cpu::logprob(p.stats[row], p.stats[n + row], p.stats[2 * n + row], inverse_t);
        const RowLoss loss = p.tokens.loss(row, logp, denominator);
        p.logprobs[row] = logp;
        p.row_losses[row] = loss.value;
        p.coefficients[row] = loss.coefficient;
    });
    p.row_losses[n] = denominator;
    if (p.loss) cpu::reduce(p.row_losses, n, p.loss);
}

void launch(const GradParams& p, uintptr_t) {
    cpu::dispatch(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (p.grad.data != p.logits.data) cpu::expect_huge_pages(p.grad, p.vocab, sizeof(T));
        cpu::for_each_row(p.logits.n, p.vocab, [&](int64_t row) { cpu::grad_row<T>(p, row); });
    });
}

void launch(const ScaleParams& p, uintptr_t) {
    const float scale = *p.scale;
    if (scale == 1.f) return;
    cpu::dispatch(p.dtype, [&](auto type) {
        using T = decltype(type);
        cpu::for_each_row(p.grad.n, p.vocab, [&](int64_t row) {
            cpu::functions<T>().multiply(cpu::row_of<T>(p.grad, row), p.vocab, scale);
        });
    });
}

}  // namespace fused_losses
