// The `launch` of launch.h: which kernel runs, with how many threads and blocks. The kernels are correct for any block
// of whole warps and any grid; what is chosen here is speed.
#include <limits.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../launch.h"
#include "device.h"
#include "kernels.cuh"
#include "runtime.h"
#include "scale.cuh"
#include "tokens.cuh"

namespace fused_losses {

namespace {

struct Shape {
    int threads;
    int64_t blocks;
};

int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

// As many blocks, or teams, as give all of them the same number of rows, or one less: with all that fit, the last turn
// of rows would leave most multiprocessors idle. at_a_time: that fit.
int64_t even_grid(int64_t n, int64_t at_a_time) { return over(n, over(n, at_a_time)); }

// How many threads a row gets decides in which order it is summed: it may depend on V, the element type and the device,
// never on N, so that a token's numbers are the same in every batch. N only limits the number of blocks.
//
// resident: threads that a multiprocessor holds, whatever the kernel; __launch_bounds__ with as many sees to that. At
// most max_threads per row and max_rows rows at a time. A thread for every 32 elements suffices: a small vocabulary
// gets small blocks, and more of them.
Shape shape(const Rows& rows, int resident, int max_threads, int64_t max_rows) {
    if (rows.vocab > INT_MAX) throw std::runtime_error("fused_losses: a vocabulary of 2^31 or more is not supported");
    const int threads = static_cast<int>(std::min<int64_t>((rows.vocab / (32 * kWarp) + 1) * kWarp, max_threads));
    const int64_t at_a_time = std::min<int64_t>(resident / threads, max_rows) * device_limits().multiprocessors;
    return {threads, even_grid(rows.n, at_a_time)};
}

// Every row is read once, or not to be found in a cache anyway. What counts is that the others go on while one row
// ends, which is most of what a short one takes: four of 256 threads rather than two of 512.
Shape stream_shape(const Rows& rows, int resident) { return shape(rows, resident, 256, resident); }

// Rows are swept twice: those in flight should stay under half of L2. Never less than one per multiprocessor, though:
// an idle one loses more than a second read of DRAM. Fewer rows at a time get more threads each.
Shape two_sweep_shape(const Rows& rows, int64_t element_bytes, int resident) {
    const DeviceLimits limits = device_limits();
    const int64_t row_bytes = std::max<int64_t>(rows.vocab * element_bytes, 1) * limits.multiprocessors;
    const int64_t max_rows = std::max<int64_t>((limits.l2_bytes / 2 + row_bytes / 2) / row_bytes, 1);
    return shape(rows, resident, resident / (max_rows == 1 ? 1 : max_rows < 4 ? 2 : 4), max_rows);
}

struct OnChipShape {
    int threads;  // of a block, a power of two; 0: not on chip
    int blocks;   // that a multiprocessor has at a time
    int chunks;   // of a block
    int team;     // blocks of a row
};

constexpr int64_t kVector = sizeof(uint4);
static_assert(sizeof(OnChipShared<float, TermsRow<Softcap>::OnChip>) <= (3 << 10),
              "more, and a chunk less has room beside it");

int64_t chunk_bytes(int threads) { return kVector * kSlots * threads; }

// Bytes of the slots of so many elements: a warp has all 32 of a vector each, or none.
int64_t slot_bytes(int64_t elements, int64_t element_bytes) {
    constexpr int64_t kPiece = kWarp * kVector;
    return over(elements * element_bytes / kVector * kVector, kPiece) * kPiece;
}

// Of the larger half of a pair's row: Team::part.
int64_t half_of(int64_t vocab, int64_t element_bytes) {
    const int64_t line = 128 / element_bytes;
    return over(vocab / 2, line) * line;
}

// A row that is on chip as a whole gets 256 threads, and a multiprocessor as many rows as it holds: while one waits at
// its barrier the others go on. A row that leaves no room for a second one gets 512 threads and all there is: what is
// left of it is read again from L2. Where that would be too much for L2, two multiprocessors take a row together, if
// the device has clusters and the row one target. Short rows are not worth it: what a row costs beside its elements is
// most of it, and they are in L2 anyway. As above, nothing here may depend on N.
//
// scratch: bytes beside the slots.
OnChipShape on_chip_shape(const Rows& rows, int64_t element_bytes, int resident, int64_t scratch, bool single) {
    constexpr int64_t kShort = 16 << 10, kSmall = 96 << 10;
    constexpr int kOfOne = 512, kOfSeveral = 256, kReserved = 1024;  // bytes that the system takes of each block's
    const DeviceLimits limits = device_limits();
    const int64_t bytes = slot_bytes(rows.vocab, element_bytes);
    if (bytes < kShort || limits.shared_bytes < kSmall || rows.vocab > INT_MAX) return {};
    const auto chunks_of = [](int threads, int64_t bytes) {
        return static_cast<int>(over(bytes, chunk_bytes(threads)));
    };
    const int64_t several =
        std::min<int64_t>(limits.shared_bytes_of_multiprocessor / (bytes + scratch + kReserved), resident / kOfSeveral);
    if (several > 1 && chunks_of(kOfSeveral, bytes) <= kGroups)
        return {kOfSeveral, static_cast<int>(several), chunks_of(kOfSeveral, bytes), 1};
    const int64_t room = limits.shared_bytes - scratch;
    const bool pairs = limits.clusters && limits.multiprocessors > 1 && single;
    const int team = pairs && 2 * bytes > 3 * room ? 2 : 1;
    const int64_t own = team == 1 ? bytes : slot_bytes(half_of(rows.vocab, element_bytes), element_bytes);
    const int chunks = own <= room ? chunks_of(kOfOne, own) : static_cast<int>(room / chunk_bytes(kOfOne));
    return {kOfOne, 1, std::min(chunks, kGroups), team};
}

// As many tokens as every block goes through for itself, where a mean's normaliser is wanted, to spare a launch.
constexpr int64_t kFewTokens = 8192;

template <class T, class Row>
void start_on_chip(const LossAndGradParams& p, const OnChipShape& s, int announced, uintptr_t stream) {
    // A vector's slot is where it is among the part's vectors: a last chunk that is not full needs no more than it has.
    const int64_t elements = s.team == 1 ? p.logits.vocab : half_of(p.logits.vocab, sizeof(T));
    const int64_t bytes = std::min<int64_t>(slot_bytes(elements, sizeof(T)), chunk_bytes(s.threads) * s.chunks);
    int log_step = 0;
    while (1 << log_step < kSlots * s.threads) ++log_step;
    OnChipParams params{p, log_step, s.chunks, announced, s.team, p.averages && p.logits.n <= kFewTokens};
    if (params.normalises)
        params.asked.problem.denominator = {nullptr, 0, 1.f};  // nothing is there yet
    else if (p.averages)
        launch(p.normaliser(), stream);
    const DeviceLimits limits = device_limits();
    const int64_t at_a_time = std::max(s.blocks * limits.multiprocessors / s.team, 1);
    // All that fit, as memory is what they wait for, unless they then push out of L2 what each has to read again.
    const int64_t rest = (elements * static_cast<int64_t>(sizeof(T)) - bytes) * limits.multiprocessors;
    const int64_t teams =
        rest <= limits.l2_bytes / 8 ? std::min(p.logits.n, at_a_time) : even_grid(p.logits.n, at_a_time);
    start(on_chip_kernel<T, Row>, teams * s.team, s.threads, sizeof(OnChipShared<T, typename Row::OnChip>) + bytes,
          stream, params, s.team);
}

// Of the next rows of a multiprocessor, in vectors: about what memory delivers from when a row has come, which is soon
// after its first sweep has begun, until that has been reduced.
constexpr int kAnnounced = (64 << 10) / kVector;

template <class Visit>
void for_type(DType dtype, Visit visit) {
    switch (dtype) {
        case DType::float32: return visit(float{});
        case DType::bfloat16: return visit(bfloat16{});
        case DType::float16: return visit(float16{});
    }
    throw std::runtime_error("fused_losses: unknown dtype");
}

template <class Kind>
struct Of {
    using Row = Kind;
};

template <class Visit>
void for_each_row(Visit visit) {
    visit(Of<PlainRow>{});
    visit(Of<TermsRow<Identity>>{});
    visit(Of<TermsRow<Softcap>>{});
}

// A tanh per element costs as much as all the rest: kernels of their own.
template <class Visit>
void for_row(bool plain, const Transform& transform, Visit visit) {
    if (plain) return visit(Of<PlainRow>{});
    return transform.softcap != 0.f ? visit(Of<TermsRow<Softcap>>{}) : visit(Of<TermsRow<Identity>>{});
}

// Of stage 2, which with statistics has more to say.
template <class Visit>
void for_row_of(const Problem& problem, Visit visit) {
    if (!problem.terms.statistics) return for_row(problem.plain, problem.transform, visit);
    return problem.transform.softcap != 0.f ? visit(Of<StatisticsRow<Softcap>>{})
                                            : visit(Of<StatisticsRow<Identity>>{});
}

template <class Visit>
void for_type_and_row(DType dtype, bool plain, const Transform& transform, Visit visit) {
    for_type(dtype, [&](auto element) { for_row(plain, transform, [&](auto kind) { visit(element, kind); }); });
}

// One small block: N is small beside N * V.
template <class Params>
void start_sum(void (*kernel)(Params), uintptr_t stream, Params params) {
    start(kernel, 1, kMaxThreads, sizeof(Partials<double, 1>), stream, params);
}

}  // namespace

void launch(const LossAndGradParams& p, uintptr_t stream) {
    if (p.logits.n == 0 && p.averages) launch(p.normaliser(), stream);
    if (p.logits.n > 0)
        for_type_and_row(p.logits.dtype, p.problem.plain, p.problem.transform, [&](auto element, auto kind) {
            using T = decltype(element);
            using Row = typename decltype(kind)::Row;
            const OnChipShape chip =
                on_chip_shape(p.logits, sizeof(T), Row::kThreadsOnChip, sizeof(OnChipShared<T, typename Row::OnChip>),
                              p.problem.targets.single());
            if (chip.threads > 0) return start_on_chip<T, Row>(p, chip, kAnnounced / chip.blocks, stream);
            if (p.averages) launch(p.normaliser(), stream);
            const Shape s = two_sweep_shape(p.logits, sizeof(T), Row::kGradThreads);
            start(loss_and_grad_kernel<T, Row>, s.blocks, s.threads, sizeof(typename Row::Shared), stream, p);
        });
    start_sum(total_kernel, stream, TotalParams{p.logits.n, p.row_losses, p.problem.denominator, p.loss});
}

std::string allow_shared(int64_t bytes) {
    cudaError_t error = cudaSuccess;
    for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16})
        for_type(dtype, [&](auto element) {
            for_each_row([&](auto kind) {
                if (error == cudaSuccess)
                    error = cudaFuncSetAttribute(on_chip_kernel<decltype(element), typename decltype(kind)::Row>,
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
            });
        });
    return error == cudaSuccess ? "" : why(error);
}

void launch(const StatsParams& p, uintptr_t stream) {
    if (p.logits.n == 0) return;
    for_type(p.logits.dtype, [&](auto element) {
        for_row_of(p.problem, [&](auto kind) {
            using Row = typename decltype(kind)::Row;
            const Shape s = stream_shape(p.logits, Row::kThreads);
            const auto kernel = [] {
                if constexpr (Row::kStatistics)
                    return statistics_kernel<decltype(element), Row>;
                else
                    return stats_kernel<decltype(element), Row>;
            }();
            start(kernel, s.blocks, s.threads, sizeof(typename Row::Shared), stream, p);
        });
    });
}

void launch(const ObjectiveParams& p, uintptr_t stream) {
    if (p.averages) launch(p.normaliser(), stream);
    if (p.n > 0) {
        const int64_t blocks =
            std::min<int64_t>((p.n + kRowThreads - 1) / kRowThreads, 8 * device_limits().multiprocessors);
        for_row_of(p.problem, [&](auto kind) {
            start(objective_kernel<typename decltype(kind)::Row>, blocks, kRowThreads, 0, stream, p);
        });
    }
    if (p.loss) start_sum(total_kernel, stream, TotalParams{p.n, p.row_losses, p.problem.denominator, p.loss});
}

void launch(const GradParams& p, uintptr_t stream) {
    if (p.logits.n == 0) return;
    for_type_and_row(p.logits.dtype, p.plain, p.transform, [&](auto element, auto kind) {
        using Row = typename decltype(kind)::Row;
        const Shape s = stream_shape(p.logits, Row::kGradThreads);
        start(grad_kernel<decltype(element), Row>, s.blocks, s.threads, sizeof(typename Row::Shared), stream, p);
    });
}

void launch(const ScaleParams& p, uintptr_t stream) {
    if (p.grad.n == 0) return;
    const Shape s = stream_shape(p.grad, kMaxThreads);
    for_type(p.grad.dtype,
             [&](auto element) { start(scale_kernel<decltype(element)>, s.blocks, s.threads, 0, stream, p); });
}

void launch(const NormaliserParams& p, uintptr_t stream) { start_sum(normaliser_kernel, stream, p); }

}  // namespace fused_losses
