// The stages as loops over rows, shared out among OpenMP's threads (torch's own: its wheel's libgomp is the one that an
// extension imported after torch is bound to). Rows are independent and sums run in one order, so the result does not
// depend on the number of threads.
#include "../launch.h"

#include <string.h>

#include <stdexcept>
#include <string>

#include "plain_row.h"
#include "terms_row.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_losses {
namespace cpu {
namespace {

constexpr int64_t kParallelFrom = 1 << 15;  // elements; below, waking a second thread costs more than it saves

// Run body(row) for every row, a few at a time: masked rows are cheap and come in spans.
template <class Body>
void for_each_row(int64_t n, int64_t vocab, Body body) {
    const int64_t chunk = std::max<int64_t>(1, kParallelFrom / std::max<int64_t>(1, vocab));
#pragma omp parallel for schedule(dynamic, chunk) if (n > 1 && n * vocab > kParallelFrom)
    for (int64_t row = 0; row < n; ++row) body(row);
}

// Call work with an element of the dtype.
template <class Work>
void for_type(DType dtype, Work work) {
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

template <class T>
void zero(T* row, int64_t vocab) {
    memset(static_cast<void*>(row), 0, vocab * sizeof(T));
}

// Fresh memory comes in 4 KiB pages, and their faults take longer than the kernel: ask for huge ones.
template <class T>
void expect_huge_pages(const Rows& rows) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kHuge = uintptr_t(1) << 21;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(rows.data) + kHuge - 1) / kHuge * kHuge;
    const uintptr_t end = reinterpret_cast<uintptr_t>(rows.data) + uintptr_t(rows.n) * rows.vocab * sizeof(T);
    if (end > begin + kHuge) madvise(reinterpret_cast<void*>(begin), (end - begin) / kHuge * kHuge, MADV_HUGEPAGE);
#endif
}

void reduce(const float* row_losses, int64_t n, float denominator, float* loss) {
    double sum = 0.0;
    for (int64_t row = 0; row < n; ++row) sum += row_losses[row];
    *loss = reduced_loss(sum, denominator);
}

void nothing_seen(const LogprobsTable& logprobs, const Problem& problem, int64_t row) {
    for (int64_t i = 0; i < problem.logprobs_rows(); ++i) logprobs.target(row, i) = 0.f;
}

// Before a kernel writes anything: on a host tensor that costs nothing, and NaN would tell less. As
// fused_losses/checks.py says it. Rows that have a part of the vocabulary have a part of the targets.
void refuse_targets_outside(const Problem& problem, const Rows& logits) {
    const Targets& targets = problem.targets;
    const int64_t n = logits.n, vocab = logits.vocab;
    if (vocab != problem.vocab) return;
    for (int64_t i = 0; i < n * targets.num; ++i) {
        const int64_t target = targets.at(i);
        if ((0 <= target && target < vocab) || target == targets.ignore_index) continue;
        throw std::invalid_argument("target_tokens must be in [0, " + std::to_string(vocab) + ") or ignore_index " +
                                    std::to_string(targets.ignore_index) + ", got " + std::to_string(target) +
                                    " at token " + std::to_string(i / targets.num) + " of " + std::to_string(n));
    }
}

// ---- A row of each stage, plain or with terms ----------------------------------------------------------------------

template <class T, class Row>
void loss_and_grad_row(const LossAndGradParams& p, int64_t row) {
    const Problem& problem = p.problem;
    const int64_t vocab = p.logits.vocab;
    const T* logits = row_of<T>(p.logits, row);
    T* grad = row_of<T>(p.grad, row);
    if (!problem.reads(row)) {
        nothing_seen(p.logprobs, problem, row);
        p.row_losses[row] = 0.f;
        return zero(grad, vocab);
    }
    Row seen(problem.targets, problem.transform, row);
    const Kept kept = Row::keep(problem, logits, grad, vocab);
    seen.sweep(problem.terms, logits, vocab, kept);
    const Softmax softmax = seen.softmax();
    const TokenLoss loss = seen.loss(problem, softmax, p.logprobs);
    p.row_losses[row] = loss.value;
    if (loss.by.none()) return zero(grad, vocab);
    seen.write_gradient(loss.by, softmax, logits, vocab, kept, grad);
}

template <class T, class Row>
void stats_row(const StatsParams& p, int64_t row) {
    if (!p.problem.reads(row)) {
        for (int64_t i = 0; i < p.problem.stats_rows(); ++i) p.stats.data[i * p.stats.n + row] = 0.f;
        return;
    }
    Row seen(p.problem.targets, p.problem.transform, row);
    seen.sweep(p.problem.terms, row_of<T>(p.logits, row), p.logits.vocab, kNothing);
    seen.store(p.stats, p.problem.terms);
}

template <class Row>
void objective_row(const ObjectiveParams& p, int64_t row) {
    const Problem& problem = p.problem;
    TokenLoss loss = {0.f, {0.f, 0.f, 0.f, 0.f}};
    if (problem.reads(row)) {
        Row seen(problem.targets, problem.transform, row);
        seen.load(p.stats);
        const Softmax softmax = seen.softmax();
        loss = seen.loss(problem, softmax, p.logprobs);
        seen.observe(problem, p.stats, softmax, p.logprobs);
    } else {
        nothing_seen(p.logprobs, problem, row);
    }
    p.row_losses[row] = loss.value;
    p.coefficients.at(row, 0) = loss.by.g;
    if (problem.plain) return;
    p.coefficients.at(row, 1) = loss.by.h;
    p.coefficients.at(row, 2) = loss.by.zeta;
    p.coefficients.at(row, 3) = loss.by.s;
}

Coefficients coefficients_of(const GradParams& p, int64_t row) {
    const float upstream = p.upstream.at(row);
    float by[4] = {};
    for (int i = 0; i < (p.plain ? 1 : 4); ++i) {  // 0 times inf is 0: a masked token's gradient stays 0
        const float saved = p.coefficients.at(row, i);
        by[i] = saved == 0.f || upstream == 0.f ? 0.f : saved * upstream;
    }
    return {by[0], by[1], by[2], by[3]};
}

template <class T, class Row>
void grad_row(const GradParams& p, int64_t row) {
    T* grad = row_of<T>(p.grad, row);
    const Coefficients by = coefficients_of(p, row);
    if (by.none()) return zero(grad, p.logits.vocab);
    Row seen(p.targets, p.transform, row);
    seen.load(p.stats);
    seen.write_gradient(by, seen.softmax(), row_of<T>(p.logits, row), p.logits.vocab, kNothing, grad);
}

}  // namespace
}  // namespace cpu

void launch(const LossAndGradParams& p, uintptr_t stream) {
    if (p.averages) launch(p.normaliser(), stream);
    cpu::refuse_targets_outside(p.problem, p.logits);
    cpu::for_type(p.logits.dtype, [&](auto type) {
        using T = decltype(type);
        if (p.grad.data != p.logits.data) cpu::expect_huge_pages<T>(p.grad);
        cpu::for_each_row(p.logits.n, p.logits.vocab, [&](int64_t row) {
            p.problem.plain ? cpu::loss_and_grad_row<T, cpu::PlainRow<T>>(p, row)
                            : cpu::loss_and_grad_row<T, cpu::TermsRow<T>>(p, row);
        });
    });
    cpu::reduce(p.row_losses, p.logits.n, p.problem.denominator.at(0), p.loss);
}

void launch(const StatsParams& p, uintptr_t) {
    cpu::refuse_targets_outside(p.problem, p.logits);
    cpu::for_type(p.logits.dtype, [&](auto type) {
        using T = decltype(type);
        cpu::for_each_row(p.logits.n, p.logits.vocab, [&](int64_t row) {
            p.problem.plain ? cpu::stats_row<T, cpu::PlainRow<T>>(p, row) : cpu::stats_row<T, cpu::TermsRow<T>>(p, row);
        });
    });
}

void launch(const ObjectiveParams& p, uintptr_t stream) {
    if (p.averages) launch(p.normaliser(), stream);
    cpu::for_each_row(p.n, 64, [&](int64_t row) {  // 64: an objective costs about as much as so many logits
        p.problem.plain ? cpu::objective_row<cpu::PlainRow<float>>(p, row)
                        : cpu::objective_row<cpu::TermsRow<float>>(p, row);
    });
    if (p.loss) cpu::reduce(p.row_losses, p.n, p.problem.denominator.at(0), p.loss);
}

void launch(const GradParams& p, uintptr_t) {
    cpu::for_type(p.logits.dtype, [&](auto type) {
        using T = decltype(type);
        if (p.grad.data != p.logits.data) cpu::expect_huge_pages<T>(p.grad);
        cpu::for_each_row(p.logits.n, p.logits.vocab, [&](int64_t row) {
            p.plain ? cpu::grad_row<T, cpu::PlainRow<T>>(p, row) : cpu::grad_row<T, cpu::TermsRow<T>>(p, row);
        });
    });
}

void launch(const ScaleParams& p, uintptr_t) {
    const float scale = *p.scale;
    if (scale == 1.f) return;
    cpu::for_type(p.grad.dtype, [&](auto type) {
        using T = decltype(type);
        cpu::for_each_row(p.grad.n, p.grad.vocab, [&](int64_t row) {
            cpu::functions<T>().multiply(cpu::row_of<T>(p.grad, row), p.grad.vocab, scale);
        });
    });
}

void launch(const NormaliserParams& p, uintptr_t) {
    double sum = 0.0;
    for (int64_t row = 0; row < p.n; ++row)
        if (!p.targets.ignored(row)) sum += p.weights.at(row);
    *p.normaliser = static_cast<float>(sum);
}

}  // namespace fused_losses
