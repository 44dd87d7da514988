// The stages as loops over rows, shared out among OpenMP's threads (torch's own: its wheel's libgomp is the one that an
// extension imported after torch is bound to). Rows are independent and sums run in one order, so the result does not
// depend on the number of threads.
#include <string.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "../row.h"
#include "vocab.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fused_losses {

void launch(const LossAndGradParams&, const Terms*, uintptr_t);
void launch(const StatsParams&, const Terms*, uintptr_t);
void launch(const ObjectiveParams&, const Terms*, uintptr_t);
void launch(const GradParams&, const Terms*, uintptr_t);
void launch(const ScaleParams&, uintptr_t);

namespace cpu {

std::vector<std::string> instruction_sets();
void use_instruction_set(const std::string&);

namespace {

constexpr float kLog2e = 1.44269504f;
constexpr int64_t kParallelFrom = 1 << 15;  // elements; below, waking a second thread costs more than it saves

struct InstructionSet {
    const char* name;
    bool usable;
    const VocabFunctions* functions;
};

// The best first. The last runs anywhere.
const std::vector<InstructionSet>& all_instruction_sets() {
    static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
        {"avx512",
         __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"),
         &vocab_avx512},
        {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), &vocab_avx2},
#endif
        {"baseline", true, &vocab_baseline},
    };
    return sets;
}

const VocabFunctions* best_functions() {
    for (const InstructionSet& set : all_instruction_sets())
        if (set.usable) return set.functions;
    return nullptr;
}

std::atomic<const VocabFunctions*>& vocab_functions() {
    static std::atomic<const VocabFunctions*> functions{best_functions()};
    return functions;
}

template <class T>
const RowFunctions<T>& functions();
template <>
const RowFunctions<float>& functions() {
    return vocab_functions().load(std::memory_order_relaxed)->float32;
}
template <>
const RowFunctions<BFloat16>& functions() {
    return vocab_functions().load(std::memory_order_relaxed)->bfloat16;
}
template <>
const RowFunctions<Float16>& functions() {
    return vocab_functions().load(std::memory_order_relaxed)->float16;
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

// On a boundary of cache lines: a vector that crosses one is stored, and loaded, twice.
float* scratch_row(int64_t vocab) {
    constexpr size_t kLine = 64 / sizeof(float);
    static thread_local std::vector<float> scratch;
    const size_t size = static_cast<size_t>(vocab) + kWhole + kLine;
    if (scratch.size() < size) scratch.resize(size);
    const size_t past = reinterpret_cast<uintptr_t>(scratch.data()) / sizeof(float) % kLine;
    return scratch.data() + (kLine - past) % kLine;
}

float* references_of(int64_t vocab) {
    static thread_local std::vector<float> references;
    references.resize((vocab + kBlock - 1) / kBlock * kReferences);
    return references.data();
}

constexpr Kept kNothing = {nullptr, nullptr, true};

// Where to keep the exponentials of a row. float32 has the gradient's own row for them, where that may be the logits'
// own; which does not do if the logits are needed again.
template <class T>
Kept kept_exponentials(const T* logits, T* grad, int64_t vocab, bool logits_again) {
    const bool own = static_cast<const void*>(grad) != logits;
    if (std::is_same<T, float>::value && (own || !logits_again))
        return {reinterpret_cast<float*>(grad), references_of(vocab), !own};
    return {scratch_row(vocab), references_of(vocab), true};
}

template <class T>
void loss_and_grad_row(const LossAndGradParams& p, int64_t row, float denominator) {
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
    const Kept kept = kept_exponentials(logits, grad, p.vocab, false);
    const Sum sum = functions<T>().exponentials(logits, p.vocab, c, kept);

    const float logp = logprob(sum.max, sum.value, logit, inverse_t);
    const RowLoss loss = tokens.loss(row, logp, denominator);
    p.logprobs[row] = logp;
    p.row_losses[row] = loss.value;
    if (loss.coefficient == 0.f) {
        memset(static_cast<void*>(grad), 0, p.vocab * sizeof(T));
        return;
    }
    const float coefficient = loss.coefficient * inverse_t;
    functions<T>().write_scaled(kept, p.vocab, sum.max, c, -coefficient / sum.value, grad);
    write_target(grad, target, p.vocab, coefficient, exp2f((logit - sum.max) * c) / sum.value);
}

template <class T>
void stats_row(const StatsParams& p, int64_t row) {
    const int64_t n = p.logits.n;
    Sum sum = {0.f, 1.f};
    float logit = 0.f;
    if (!p.targets.ignored(row) && (p.all_logprobs || p.weights.at(row) != 0.f)) {
        const T* logits = row_of<T>(p.logits, row);
        sum = functions<T>().exponentials(logits, p.vocab, kLog2e * inverse_temperature(p.temperature, row), kNothing);
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

// ---- With terms ----------------------------------------------------------------------------------------------------

constexpr float kLn2 = 0.693147181f;

// What a row shows when it has terms, in natural units.
struct RowStats {
    float max;     // of the raw logits
    float sum;     // sum_j e^d_j, d_j = z_j - z_max
    float moment;  // sum_j e^d_j d_j
    float mean;    // mean_j d_j
};

// z is a level times this.
float scale_of(const Terms& terms, float inverse_t) {
    return terms.softcap != 0.f ? terms.softcap * inverse_t : inverse_t;
}

template <class T>
RowStats sweep(const T* logits, int64_t vocab, const Terms& terms, float inverse_t, Kept kept) {
    const RowFunctions<T>& f = functions<T>();
    const float scale = scale_of(terms, inverse_t), c = kLog2e * scale;
    RowStats out;
    if (terms.entropy || terms.softcap != 0.f) {
        const SumAndMoment seen = f.moments(logits, vocab, c, terms.softcap, kept);
        out = {seen.sum.max, seen.sum.value, kLn2 * seen.moment, 0.f};
    } else {
        const Sum sum = f.exponentials(logits, vocab, c, kept);
        out = {sum.max, sum.value, 0.f, 0.f};
    }
    if (terms.label_smoothing != 0.f) out.mean = f.mean_distance(logits, vocab, out.max, terms.softcap) * scale;
    if (!terms.entropy) out.moment = 0.f;
    return out;
}

// The targets' logits and logprobs, kept while the row itself is written over.
struct TargetScratch {
    std::vector<float> logits, logprobs;
    std::vector<int64_t> order;
};

TargetScratch& target_scratch(int64_t num) {
    static thread_local TargetScratch scratch;
    scratch.logits.resize(num);
    scratch.logprobs.resize(num);
    return scratch;
}

// What the objective gets, from a row's stats and its targets' logits, whose logprobs are filled in.
template <class T>
RowSeen seen_of(const RowStats& stats, const Targets& targets, const Terms& terms, float inverse_t, int64_t row,
                TargetScratch& scratch) {
    const float scale = scale_of(terms, inverse_t), log_sum = logf(stats.sum);
    const float top = functions<T>().level(stats.max, terms.softcap);
    RowSeen seen = {0.f, 0.f, top * scale + log_sum, 0.f, log_sum - stats.mean};
    if (terms.entropy) seen.entropy = log_sum - stats.moment / stats.sum;
    for (int64_t k = 0; k < targets.num; ++k) {
        const float y = functions<T>().level(scratch.logits[k], terms.softcap);
        const float share = terms.share(row * targets.num + k);
        // of a target that counts ignore_index is not asked: the gradient stage, which comes here too, has none
        const bool ignored = share == 0.f && targets.at(row, k) == targets.ignore_index;
        const float logp = ignored ? 0.f : logprob(top, stats.sum, y, scale);
        scratch.logprobs[k] = logp;
        if (share == 0.f) continue;
        seen.logp += share * logp;
        seen.total += share;
    }
    return seen;
}

// The whole gradient of a row but its targets' elements, then these, formed in float32.
template <class T>
void write_terms(const T* logits, Kept kept, int64_t vocab, const Targets& targets, const Terms& terms, float inverse_t,
                 int64_t row, const RowStats& stats, float total, const Coefficients& by, TargetScratch& scratch,
                 T* grad) {
    const RowFunctions<T>& f = functions<T>();
    const float c = kLog2e * scale_of(terms, inverse_t);
    const float mean_d = stats.moment / stats.sum, factor = inverse_t / stats.sum;
    const float dense = by.zeta - by.g * total + by.h * mean_d, offset = by.s / vocab;
    if (kept.exps && by.h == 0.f && by.s == 0.f && terms.softcap == 0.f) {
        f.write_scaled(kept, vocab, stats.max, c, dense * factor, grad);
    } else {
        f.write_combination(logits, kept, vocab, stats.max, c, terms.softcap,
                            {dense * factor, -by.h * kLn2 * factor, offset * inverse_t}, grad);
    }
    std::vector<int64_t>& order = scratch.order;  // counting targets, equal ones side by side
    order.clear();
    for (int64_t k = 0; k < targets.num; ++k)
        if (terms.share(row * targets.num + k) != 0.f) order.push_back(k);
    const auto target = [&](int64_t k) { return targets.at(row, k); };
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return target(a) != target(b) ? target(a) < target(b) : a < b; });
    const float log_sum = logf(stats.sum);
    for (size_t i = 0; i < order.size();) {
        const int64_t k = order[i], j = target(k);
        float share = 0.f;
        for (; i < order.size() && target(order[i]) == j; ++i) share += terms.share(row * targets.num + order[i]);
        if (j < 0 || j >= vocab) continue;  // its logprob is NaN, and so is the row
        const float logp = scratch.logprobs[k], p = expf(logp);
        const float others = by.zeta - by.h * (p == 0.f ? 0.f : logp + log_sum - mean_d);
        // share - U p, exact where p is near 1 and the target has all of U, too
        const float drawn = p < 0.5f ? share - total * p : (share - total) - total * expm1f(logp);
        const float own = by.g * drawn + p * others + offset;
        f.store(grad + j, own * inverse_t * f.level_slope(scratch.logits[k], terms.softcap));
    }
}

template <class T>
void terms_row(const LossAndGradParams& p, const Terms& terms, int64_t row, float denominator) {
    const int64_t n = p.logits.n;
    const T* logits = row_of<T>(p.logits, row);
    T* grad = row_of<T>(p.grad, row);
    const Tokens& tokens = p.tokens;
    const Targets& targets = tokens.targets;
    TargetScratch& scratch = target_scratch(targets.num);
    std::fill(scratch.logprobs.begin(), scratch.logprobs.end(), 0.f);

    TermsLoss loss = {0.f, {0.f, 0.f, 0.f, 0.f}};
    RowSeen seen = {};
    const bool read = !targets.ignored(row) && (p.all_logprobs || tokens.active(row));
    if (read) {
        for (int64_t k = 0; k < targets.num; ++k) scratch.logits[k] = target_logit(logits, targets.at(row, k), p.vocab);
        const float inverse_t = inverse_temperature(p.temperature, row);
        const bool again = terms.entropy || terms.label_smoothing != 0.f;
        // a softcap's tanh is made again, and the exponential with it
        const Kept kept = terms.softcap != 0.f ? kNothing : kept_exponentials(logits, grad, p.vocab, again);
        const RowStats stats = sweep(logits, p.vocab, terms, inverse_t, kept);
        seen = seen_of<T>(stats, targets, terms, inverse_t, row, scratch);
        loss = terms_loss(tokens, terms, row, seen, denominator);
        if (!loss.by.none())
            write_terms(logits, kept, p.vocab, targets, terms, inverse_t, row, stats, seen.total, loss.by, scratch,
                        grad);
    }
    if (loss.by.none()) memset(static_cast<void*>(grad), 0, p.vocab * sizeof(T));
    for (int64_t k = 0; k < targets.num; ++k) p.logprobs[k * n + row] = scratch.logprobs[k];
    p.logprobs[targets.num * n + row] = seen.entropy;
    p.row_losses[row] = loss.value;
}

template <class T>
void terms_stats_row(const StatsParams& p, const Terms& terms, int64_t row) {
    const int64_t n = p.logits.n, num = p.targets.num;
    RowStats stats = {0.f, 1.f, 0.f, 0.f};
    const bool read = !p.targets.ignored(row) && (p.all_logprobs || p.weights.at(row) != 0.f);
    const T* logits = row_of<T>(p.logits, row);
    if (read) stats = sweep(logits, p.vocab, terms, inverse_temperature(p.temperature, row), kNothing);
    p.stats[row] = stats.max;
    p.stats[n + row] = stats.sum;
    for (int64_t k = 0; k < num; ++k)
        p.stats[(2 + k) * n + row] = read ? target_logit(logits, p.targets.at(row, k), p.vocab) : 0.f;
    p.stats[(2 + num) * n + row] = stats.moment;
    p.stats[(3 + num) * n + row] = stats.mean;
}

RowStats saved_stats(const float* stats, int64_t n, int64_t row, TargetScratch& scratch, int64_t num) {
    for (int64_t k = 0; k < num; ++k) scratch.logits[k] = stats[(2 + k) * n + row];
    return {stats[row], stats[n + row], stats[(2 + num) * n + row], stats[(3 + num) * n + row]};
}

void terms_objective_row(const ObjectiveParams& p, const Terms& terms, int64_t row, float denominator) {
    const int64_t n = p.n;
    const Targets& targets = p.tokens.targets;
    TargetScratch& scratch = target_scratch(targets.num);
    const RowStats stats = saved_stats(p.stats, n, row, scratch, targets.num);
    const float inverse_t = inverse_temperature(p.temperature, row);
    const RowSeen seen = seen_of<float>(stats, targets, terms, inverse_t, row, scratch);
    const TermsLoss loss = terms_loss(p.tokens, terms, row, seen, denominator);
    for (int64_t k = 0; k < targets.num; ++k) p.logprobs[k * n + row] = scratch.logprobs[k];
    p.logprobs[targets.num * n + row] = seen.entropy;
    p.row_losses[row] = loss.value;
    const float by[4] = {loss.by.g, loss.by.h, loss.by.zeta, loss.by.s};
    for (int64_t i = 0; i < 4; ++i) p.coefficients[i * n + row] = by[i];
}

template <class T>
void terms_grad_row(const GradParams& p, const Terms& terms, int64_t row) {
    const int64_t n = p.logits.n;
    T* grad = row_of<T>(p.grad, row);
    const float upstream = p.upstream.at(row);
    float by[4];
    for (int64_t i = 0; i < 4; ++i) {
        const float saved = p.coefficients.data[i * n + row];
        by[i] = saved == 0.f || upstream == 0.f ? 0.f : saved * upstream;
    }
    const Coefficients coefficients = {by[0], by[1], by[2], by[3]};
    if (coefficients.none()) {
        memset(static_cast<void*>(grad), 0, p.vocab * sizeof(T));
        return;
    }
    TargetScratch& scratch = target_scratch(p.targets.num);
    const RowStats stats = saved_stats(p.stats, n, row, scratch, p.targets.num);
    const float inverse_t = inverse_temperature(p.temperature, row);
    const RowSeen seen = seen_of<T>(stats, p.targets, terms, inverse_t, row, scratch);
    write_terms<T>(row_of<T>(p.logits, row), kNothing, p.vocab, p.targets, terms, inverse_t, row, stats, seen.total,
                   coefficients, scratch, grad);
    if (seen.logp != seen.logp)  // a target outside [0, V), whatever the coefficients, which need not be ours
        for (int64_t j = 0; j < p.vocab; ++j) functions<T>().store(grad + j, NAN);
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const InstructionSet& set : all_instruction_sets())
        if (set.usable) names.push_back(set.name);
    return names;
}

void use_instruction_set(const std::string& name) {
    for (const InstructionSet& set : all_instruction_sets()) {
        if (!set.usable || name != set.name) continue;
        vocab_functions() = set.functions;
        return;
    }
    throw std::invalid_argument("instruction set " + name + " does not exist or does not run here");
}

}  // namespace cpu

void launch(const LossAndGradParams& p, const Terms* terms, uintptr_t) {
    const int64_t n = p.logits.n;
    const float denominator = p.mean ? cpu::normaliser(p.tokens, n) : p.denominator.at(0);
    cpu::dispatch(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (p.grad.data != p.logits.data) cpu::expect_huge_pages(p.grad, p.vocab, sizeof(T));
        cpu::for_each_row(n, p.vocab, [&](int64_t row) {
            terms ? cpu::terms_row<T>(p, *terms, row, denominator) : cpu::loss_and_grad_row<T>(p, row, denominator);
        });
    });
    p.row_losses[n] = denominator;
    cpu::reduce(p.row_losses, n, p.loss);
}

void launch(const StatsParams& p, const Terms* terms, uintptr_t) {
    cpu::dispatch(p.dtype, [&](auto type) {
        using T = decltype(type);
        cpu::for_each_row(p.logits.n, p.vocab, [&](int64_t row) {
            terms ? cpu::terms_stats_row<T>(p, *terms, row) : cpu::stats_row<T>(p, row);
        });
    });
}

void launch(const ObjectiveParams& p, const Terms* terms, uintptr_t) {
    const int64_t n = p.n;
    const float denominator = p.mean ? cpu::normaliser(p.tokens, n) : p.denominator.at(0);
    cpu::for_each_row(n, 64, [&](int64_t row) {  // 64: an objective costs about as much as so many logits
        if (terms) return cpu::terms_objective_row(p, *terms, row, denominator);
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

void launch(const GradParams& p, const Terms* terms, uintptr_t) {
    cpu::dispatch(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (p.grad.data != p.logits.data) cpu::expect_huge_pages(p.grad, p.vocab, sizeof(T));
        cpu::for_each_row(p.logits.n, p.vocab, [&](int64_t row) {
            terms ? cpu::terms_grad_row<T>(p, *terms, row) : cpu::grad_row<T>(p, row);
        });
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
