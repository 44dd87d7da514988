// The `launch` of bindings.h: which kernel runs, with how many threads and blocks. The kernels are correct for any
// block of whole warps and any grid; what is chosen here is speed.
#include <limits.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "device.h"
#include "grad.cuh"
#include "loss_and_grad.cuh"
#include "objective.cuh"
#include "scale.cuh"
#include "stats.cuh"

namespace fused_losses {

namespace {

struct Shape {
    int threads;
    int64_t blocks;
};

// resident: threads that a multiprocessor holds, whatever the kernel; __launch_bounds__ with as many sees to that. At
// most resident / share per row and max_rows rows at a time. A thread for every 32 elements suffices: a small
// vocabulary gets small blocks, and more of them.
Shape shape(int64_t n, int64_t vocab, int resident, int share, int64_t max_rows) {
    if (vocab > INT_MAX) throw std::runtime_error("fused_losses: a vocabulary of 2^31 or more is not supported");
    const int threads = static_cast<int>(std::min<int64_t>((vocab / (32 * kWarp) + 1) * kWarp, resident / share));
    const int64_t rows = std::min<int64_t>(resident / threads, max_rows);
    return {threads, std::min(n, rows * device_limits().multiprocessors)};
}

// Every row is read once, or not to be found in a cache anyway.
Shape stream_shape(int64_t n, int64_t vocab, int resident = kMaxThreads) {
    return shape(n, vocab, resident, 2, resident);
}

// Rows are swept twice: those in flight should stay under half of L2. Never less than one per multiprocessor, though:
// an idle one loses more than a second read of DRAM. Fewer rows at a time get more threads each.
Shape two_sweep_shape(int64_t n, int64_t vocab, int64_t element_bytes, int resident = kMaxThreads) {
    const DeviceLimits limits = device_limits();
    const int64_t row_bytes = std::max<int64_t>(vocab * element_bytes, 1) * limits.multiprocessors;
    const int64_t rows = std::max<int64_t>((limits.l2_bytes / 2 + row_bytes / 2) / row_bytes, 1);
    return shape(n, vocab, resident, rows == 1 ? 1 : rows < 4 ? 2 : 4, rows);
}

template <class Visit>
void for_type(DType dtype, Visit visit) {
    switch (dtype) {
        case DType::float32: return visit(float{});
        case DType::bfloat16: return visit(bfloat16{});
        case DType::float16: return visit(float16{});
    }
    throw std::runtime_error("fused_losses: unknown dtype");
}

// A tanh per element costs as much as all the rest: kernels of their own.
template <class Visit>
void for_transform(const Terms& terms, Visit visit) {
    return terms.softcap != 0.f ? visit(Softcap{}) : visit(Identity{});
}

// Both are one small block: N is small beside N * V.
void start_normaliser(const Tokens& tokens, int64_t n, float* row_losses, uintptr_t stream) {
    start(normaliser_kernel, 1, kMaxThreads, sizeof(BlockReduce<double>::Shared), stream,
          NormaliserParams{tokens, n, row_losses});
}

void start_total(const Column& denominator, bool mean, int64_t n, float* row_losses, float* loss, uintptr_t stream) {
    start(total_kernel, 1, kMaxThreads, sizeof(BlockReduce<double>::Shared), stream,
          TotalParams{denominator, mean, n, row_losses, loss});
}

}  // namespace

void launch(const LossAndGradParams& p, const Terms* terms, uintptr_t stream) {
    const int64_t n = p.logits.n;
    if (p.mean) start_normaliser(p.tokens, n, p.row_losses, stream);
    if (n > 0) {
        for_type(p.dtype, [&](auto element) {
            using T = decltype(element);
            if (!terms) {
                const Shape s = two_sweep_shape(n, p.vocab, sizeof(T));
                return start(loss_and_grad_kernel<T>, s.blocks, s.threads, sizeof(BlockReduce<Online<Sum>>::Shared),
                             stream, p);
            }
            for_transform(*terms, [&](auto z) {
                using Z = decltype(z);
                const Shape s = two_sweep_shape(n, p.vocab, sizeof(T), Z::kThreads);
                start(terms_loss_and_grad_kernel<T, Z>, s.blocks, s.threads, sizeof(TermsShared), stream,
                      WithTerms<LossAndGradParams>{p, *terms});
            });
        });
    }
    start_total(p.denominator, p.mean, n, p.row_losses, p.loss, stream);
}

void launch(const StatsParams& p, const Terms* terms, uintptr_t stream) {
    const int64_t n = p.logits.n;
    if (n == 0) return;
    for_type(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (!terms) {
            const Shape s = stream_shape(n, p.vocab);
            return start(stats_kernel<T>, s.blocks, s.threads, sizeof(BlockReduce<Online<Sum>>::Shared), stream, p);
        }
        for_transform(*terms, [&](auto z) {
            using Z = decltype(z);
            const Shape s = stream_shape(n, p.vocab, Z::kThreads);
            start(terms_stats_kernel<T, Z>, s.blocks, s.threads, sizeof(BlockReduce<Online<Moments>>::Shared), stream,
                  WithTerms<StatsParams>{p, *terms});
        });
    });
}

void launch(const ObjectiveParams& p, const Terms* terms, uintptr_t stream) {
    constexpr int kRowThreads = 128;
    if (p.loss && p.mean) start_normaliser(p.tokens, p.n, p.row_losses, stream);
    if (p.n > 0 || !p.loss) {  // without a reduction, the kernel writes the denominator
        const int64_t needed = std::max<int64_t>((p.n + kRowThreads - 1) / kRowThreads, 1);
        const int64_t blocks = std::min<int64_t>(needed, 8 * device_limits().multiprocessors);
        if (!terms)
            start(objective_kernel, blocks, kRowThreads, 0, stream, p);
        else
            for_transform(*terms, [&](auto z) {
                start(terms_objective_kernel<decltype(z)>, blocks, kRowThreads, 0, stream,
                      WithTerms<ObjectiveParams>{p, *terms});
            });
    }
    if (p.loss) start_total(p.denominator, p.mean, p.n, p.row_losses, p.loss, stream);
}

void launch(const GradParams& p, const Terms* terms, uintptr_t stream) {
    const int64_t n = p.logits.n;
    if (n == 0) return;
    for_type(p.dtype, [&](auto element) {
        using T = decltype(element);
        if (!terms) {
            const Shape s = stream_shape(n, p.vocab);
            return start(grad_kernel<T>, s.blocks, s.threads, 0, stream, p);
        }
        for_transform(*terms, [&](auto z) {
            using Z = decltype(z);
            const Shape s = stream_shape(n, p.vocab, Z::kThreads);
            start(terms_grad_kernel<T, Z>, s.blocks, s.threads, sizeof(BlockReduce<TargetSums>::Shared), stream,
                  WithTerms<GradParams>{p, *terms});
        });
    });
}

void launch(const ScaleParams& p, uintptr_t stream) {
    if (p.grad.n == 0) return;
    const Shape s = stream_shape(p.grad.n, p.vocab);
    for_type(p.dtype, [&](auto element) {
        using T = decltype(element);
        start(scale_kernel<T>, s.blocks, s.threads, 0, stream, p);
    });
}

}  // namespace fused_losses
