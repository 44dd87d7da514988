"""The CUDA kernels, compiled for the CPU with one fiber per thread: right everywhere, and the tests can tell."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
from cases import DTYPES, LOSSES, MODES, check, make
from test_statistics import TRANSFORMS, assert_statistics
from test_terms import OPTIONS, drawn, with_targets

from fused_losses.backends.cpu import BACKEND as CPU

sys.path.insert(0, str(Path(__file__).parent / "host_cuda"))
import compiler
import draw

pytestmark = pytest.mark.skipif(
    shutil.which(compiler.CXX) is None, reason=f"there is no {compiler.CXX} to compile with"
)


@pytest.fixture(scope="module")
def entry(tmp_path_factory) -> Path:
    return compiler.entry(tmp_path_factory.mktemp("entry"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory) -> Path:
    return draw.write(tmp_path_factory.mktemp("cases") / "cases.pickle", 160)


def test_every_case(entry, cases, tmp_path):
    done = compiler.sweep(compiler.build(tmp_path, entry), cases)
    assert done.returncode == 0 and "160 cases" in done.stdout, done.stderr[-3000:]


@pytest.fixture(scope="module")
def device_code(entry, tmp_path_factory):
    bindings = compiler.bindings(tmp_path_factory.mktemp("bindings"))
    path = compiler.build(tmp_path_factory.mktemp("device_code"), entry, bindings)
    spec = importlib.util.spec_from_file_location("_host_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def in_the_library(device_code, monkeypatch) -> None:
    """In the place of the CPU module, against the error that the contract allows. ex2 errs as on a GPU."""
    monkeypatch.setattr(CPU, "cause", None)
    monkeypatch.setattr(CPU, "module", device_code)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("objective", LOSSES)
def test_through_the_library(in_the_library, objective, mode, dtype):
    for vocab in (33, 3001):
        check(make(objective, (7,), vocab, dtype), "cpu", upstream=0.5, **MODES[mode])


@pytest.mark.parametrize("mode", ["in place", "recompute"])
@pytest.mark.parametrize("objective, name, option", OPTIONS, ids=lambda v: v if isinstance(v, str) else "")
def test_terms_through_the_library(in_the_library, objective, name, option, mode):
    for vocab, dtype in zip((33, 130, 1001), DTYPES, strict=True):
        check(make(objective, (7,), vocab, dtype, **drawn(option)), "cpu", upstream=0.5, **MODES[mode])


@pytest.mark.parametrize("mode", ["in place", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_targets_through_the_library(in_the_library, dtype, mode):
    for k in (2, 70):  # a row of 130 elements has 32 threads
        case = with_targets(make("cross_entropy", (7,), 130, dtype), k, reduction="sum", **MODES[mode])
        check(case.having(label_smoothing=0.1, z_loss=0.01, softcap=9.0), "cpu", upstream=0.5)


@pytest.mark.parametrize("transforms", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_through_the_library(in_the_library, dtype, transforms):
    for vocab in (1, 33, 3001):
        case = make("logprobs", (7,), vocab, dtype)
        case.target_tokens[:2] = case.logits[:2].argmax(-1)
        assert_statistics(case.logits, case.target_tokens, "cpu", **transforms)


def test_every_case_under_sanitizers(entry, cases, tmp_path):
    """No access outside the rows, none to rows that must not be read, no undefined behaviour."""
    done = compiler.sweep(compiler.build(tmp_path, entry, sanitize=True), cases, sanitize=True, first=36)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def races(tmp_path_factory) -> Path:
    return compiler.races(tmp_path_factory.mktemp("races"))


def test_every_case_without_races(entry, races, cases, tmp_path):
    """No two threads come to one place with nothing that orders them, whichever came first here."""
    done = compiler.sweep(compiler.build(tmp_path, entry, races, watch=True), cases, first=36)
    assert done.returncode == 0, compiler.located(done.stderr[-3000:], tmp_path / compiler.LIBRARY)


# name: file, text, replacement. Each is a bug somebody could write; the sweep must not pass with it.
BUGS = {
    "barrier dropped": ("cuda/block.cuh", "    team.barrier();\n", ""),
    "barrier in a branch": (
        "cuda/block.cuh",
        "            team.tell(partials[team.rank() * warps + warp], x);\n    }\n    team.barrier();",
        "            team.tell(partials[team.rank() * warps + warp], x);\n        team.barrier();\n    }",
    ),
    "partials used again too early": ("cuda/block.cuh", "turn ^= 1;", ""),
    "half a warp reduced": ("cuda/block.cuh", "lane > 0; lane /= 2) x +=", "lane > 1; lane /= 2) x +="),
    "a quarter of a warp reduced": ("cuda/block.cuh", "lane >= kFew; lane /= 2) x +=", "lane > kFew; lane /= 2) x +="),
    "few partials for the first lanes only": ("cuda/block.cuh", "few ? lane % kFew : lane", "lane"),
    "many partials taken for few": ("cuda/block.cuh", "few = count <= kFew;", "few = true;"),
    "maxima compared as integers": (
        "cuda/block.cuh",
        "return bits ^ (bits >> 31 & 0x7fffffff);",
        "return bits;",
    ),
    "tail short by one": (
        "cuda/two_sweeps.cuh",
        "edges = vocab - vectors * kWidth<T>;",
        "edges = vocab - vectors * kWidth<T> - 1;",
    ),
    "one vector too many": ("cuda/two_sweeps.cuh", "return at < span.vectors &&", "return at <= span.vectors &&"),
    "first vector left out": ("cuda/two_sweeps.cuh", "v >= 0; v -= step", "v > 0; v -= step"),
    "head peeled to 8 bytes": ("cuda/two_sweeps.cuh", "% 16 / sizeof(T)", "% 8 / sizeof(T)"),
    "phases taken for equal": ("cuda/two_sweeps.cuh", "skewed ? load_skewed(p, skew)", "false ? load_skewed(p, skew)"),
    "skewed loads beyond the row": ("cuda/two_sweeps.cuh", "if (skew) shrunk.shrink();", ""),
    "sum not rescaled": (
        "cuda/sums.cuh",
        "void rescale(float, float factor) { sum *= factor; }",
        "void rescale(float, float) {}",
    ),
    "maximum starts at -inf": ("cuda/transform.cuh", "kFloor = -3.402823466e+38f", "kFloor = -INFINITY"),
    "int32 row offset": ("cuda/row.cuh", "+ rows.offset(row)", "+ static_cast<int>(rows.offset(row))"),
    "int32 target": ("cuda/row.cuh", "const int64_t target = targets", "const int32_t target = targets"),
    "target not checked": ("cuda/row.cuh", "0 <= target && target < vocab ?", "0 <= target ?"),
    "target by the wrong thread": ("cuda/two_sweeps.cuh", "(vector + before) % blockDim.x", "vector % blockDim.x"),
    "target's vector from the row's beginning": (
        "cuda/two_sweeps.cuh",
        "const int vector = (j - this->head) / kWidth<T>;",
        "const int vector = j / kWidth<T>;",
    ),
    "stores by the order of the sums": (
        "cuda/two_sweeps.cuh",
        "before(in_line(row + span.head)) {}",
        "before(0) {}",
    ),
    "the first vectors left out": (
        "cuda/two_sweeps.cuh",
        "return vector < 0 ? vector + static_cast<int>(blockDim.x) : vector;",
        "return vector < 0 ? vector + 2 * static_cast<int>(blockDim.x) : vector;",
    ),
    "target element left as the others": ("cuda/plain_row.cuh", "if (element >= 0 && static", "if (false && static"),
    "target's logit after its gradient": (
        "cuda/kernels.cuh",
        "            row.write_targets("
        "grad, map_row(logits, grad, vocab, row.template dense<Distance>()), row.left_out);\n"
        "        row.finish(",
        "        {\n"
        "            const Written<T> span = map_row(logits, grad, vocab, row.template dense<Distance>());\n"
        "            row.read_targets(logits, p.logprobs.data);\n"
        "            if (reads) row.evaluate(problem, problem.denominator.at(0), shared, turn);\n"
        "            row.write_targets(grad, span, row.left_out);\n"
        "        }\n"
        "        row.finish(",
    ),
    "ignored row read": (
        "problem.h",
        "return !targets.ignored(aim) && (all_logprobs ||",
        "return (all_logprobs ||",
    ),
    "multiplied by 0, not selected": (
        "cuda/plain_row.cuh",
        "bool idle() const { return loss_.by.g == 0.f; }",
        "bool idle() const { return false; }",
    ),
    "idle token times the upstream": (
        "cuda/plain_row.cuh",
        "times(coefficients.at(row_), upstream)",
        "coefficients.at(row_) * upstream",
    ),
    "temperature left out of the slope": (
        "cuda/plain_row.cuh",
        "factor = z.scale * (-loss_",
        "factor = (-loss_",
    ),
    "temperature left out of the target's slope": (
        "cuda/plain_row.cuh",
        "z.scale * target_gradient",
        "target_gradient",
    ),
    "rows beyond the grid": (
        "cuda/kernels.cuh",
        "i < p.logits.n; i += gridDim.x) {\n        Row row(problem.targets, problem.transform, i, i, i, vocab, p.log",
        "i < p.logits.n; i += p.logits.n) {\n        Row row(problem.targets, problem.transform, i, i, i, vocab, p.log",
    ),
    "ignored tokens in the normaliser": ("cuda/tokens.cuh", "return targets.ignored(row) ? 0.f :", "return"),
    "g without its clip": ("objectives.h", "-ceiling * advantage, 0.f}", "-ceiling * advantage, -ratio * advantage}"),
    "ignore_index in the gradient": (
        "cuda/plain_row.cuh",
        "if (!idle()) softmax_ = softmax();",
        "if (!idle()) softmax_ = softmax();\n        if (left_out == 0) loss_.by.g = 0.f;",
    ),
    "moment not rescaled": (
        "cuda/sums.cuh",
        "moment = factor * (moment + fmaxf(exponent, kLowestExponent) * sum);",
        "moment *= factor;",
    ),
    "moment rescaled after its sum": (
        "cuda/sums.cuh",
        "moment = factor * (moment + fmaxf(exponent, kLowestExponent) * sum);\n        sum *= factor;",
        "sum *= factor;\n        moment = factor * (moment + fmaxf(exponent, kLowestExponent) * sum);",
    ),
    "p log p of 0 is NaN": (
        "cuda/sums.cuh",
        "moment += e * Z::finite(exponent);",
        "moment += e * exponent;",
    ),
    "drift to several maxima": ("cuda/sums.cuh", "drift += count * fmaxf(exponent, kFloor);", ""),
    "shift overflows": ("cuda/sums.cuh", "count * fmaxf(exponent, kFloor)", "count * exponent"),
    "moment in log2": ("cuda/terms_row.cuh", "all.sums.moment * kLn2", "all.sums.moment"),
    # statistics
    "squares not rescaled": ("cuda/sums.cuh", "        squares *= factor * factor;\n", ""),
    "squares rescaled as the sum": ("cuda/sums.cuh", "squares *= factor * factor;", "squares *= factor;"),
    "squares of a part of the row": ("cuda/sums.cuh", "squares += other.squares;", ""),
    "squares of one lane": ("cuda/block.cuh", "warp_sum(x.squares, few)};", "x.squares};"),
    "the target's own square left out": ("loss.h", "logf(others + own * own)", "logf(others)"),
    "squares not moved to the target": ("loss.h", "expf(-2.f * softmax.lead) * squares", "squares"),
    "log of 1 + the others' squares": ("loss.h", "own == 1.f ? log1pf(others) :", "false ? log1pf(others) :"),
    "no drift": (
        "cuda/terms_row.cuh",
        "kStatistics || terms.label_smoothing != 0.f ?",
        "terms.label_smoothing != 0.f ?",
    ),
    "mean from the larger of maximum and target": (
        "cuda/terms_row.cuh",
        "maximum = z.level(maximum_) * z.scale",
        "maximum = z.level(raw_top()) * z.scale",
    ),
    "every tie won": ("cuda/terms_row.cuh", "top1_ = !__syncthreads_or(before);", "top1_ = true;"),
    "every tie lost": ("cuda/terms_row.cuh", "if (target_ != rival) return;", "return;"),
    "ties up to the target itself": (
        "cuda/terms_row.cuh",
        "j < left_out; j += blockDim.x) before |=",
        "j <= left_out; j += blockDim.x) before |=",
    ),
    "ties but for the last": (
        "cuda/terms_row.cuh",
        "j < left_out; j += blockDim.x) before |=",
        "j < left_out - 1; j += blockDim.x) before |=",
    ),
    "each thread's own ties": ("cuda/terms_row.cuh", "!__syncthreads_or(before)", "!before"),
    "statistics of a token without a logprob": (
        "loss.h",
        "if (softmax.logprob() != softmax.logprob()) return {NAN, NAN, 0.f};",
        "",
    ),
    "statistics of what was not read": (
        "cuda/terms_row.cuh",
        "logprobs.store(row_, reads ? seen : Statistics{});",
        "logprobs.store(row_, seen);",
    ),
    "tanh by ex2 alone": ("cuda/transform.cuh", "return rest >= kCheapRest ?", "return false ?"),
    "tanh's series too far": ("cuda/transform.cuh", "rest >= kCheapRest ?", "rest > 0.2f ?"),
    "softcap left out of the scale": ("cuda/transform.cuh", "{softcap * inverse_temperature,", "{inverse_temperature,"),
    "softcap left out of the slope": ("cuda/terms_row.cuh", "Z::sloped(by_level(at.level), at)", "by_level(at.level)"),
    "softcap left out of the slope of what is cheap": (
        "cuda/terms_row.cuh",
        "Z::cheap_sloped(by_level(level), level)",
        "by_level(level)",
    ),
    "softcap left out of the target's slope": (
        "cuda/terms_row.cuh",
        "return z.sloped(z.inverse_temperature() * dz, logit(k));",
        "return z.inverse_temperature() * dz;",
    ),
    "a slope that is lost far out": (
        "cuda/transform.cuh",
        "return multiply(multiply(y, at.rest), 2.f - at.rest);",
        "return cheap_sloped(y, at.level);",
    ),
    "0 * -inf in the gradient": (
        "cuda/terms_row.cuh",
        "const X of_e = Z::finite(exponent(level));",
        "const X of_e = exponent(level);",
    ),
    "mean of z left out of the gradient": (
        "cuda/terms_row.cuh",
        "multiply_add(exp2_approx(of_e), share, all_of<X>(offset))",
        "multiply(exp2_approx(of_e), share)",
    ),
    "U taken for 1": ("loss.h", "by.zeta - by.g * whole +", "by.zeta - by.g +"),
    "targets left as the others": ("loss.h", "? share - whole * target.p :", "? 0.f - whole * target.p :"),
    "targets that do not count": ("cuda/terms_row.cuh", "if (share == 0.f) return;", ""),
    "no target beyond the block": (
        "cuda/terms_row.cuh",
        "k += step) sums.add",
        "k += num()) sums.add",
    ),
    "a target twice, with its own share": (
        "cuda/terms_row.cuh",
        "index(i) == target ? share(i)",
        "i == k ? share(i)",
    ),
    "a target twice, written by nobody": ("cuda/terms_row.cuh", "i < k && of_it", "of_it"),
    "targets before the others are done": ("cuda/terms_row.cuh", "__syncthreads();", ""),
    "one target by thread 0": ("cuda/terms_row.cuh", "== span.owner(element)", "== 0"),
    "targets' logits after their gradient": (
        "cuda/kernels.cuh",
        "        row.finish(p.logprobs, threadIdx.x, blockDim.x, reads",
        "        if (reads) row.read_targets(logits, p.logprobs.data);\n"
        "        row.finish(p.logprobs, threadIdx.x, blockDim.x, reads",
    ),
    "no coefficient, multiplied": (
        "cuda/terms_row.cuh",
        "bool idle() const { return loss_.by.none(); }",
        "bool idle() const { return false; }",
    ),
    "idle token with terms times the upstream": (
        "cuda/terms_row.cuh",
        "times(coefficients.at(row_, i), upstream)",
        "coefficients.at(row_, i) * upstream",
    ),
    "target outside, coefficients from elsewhere": (
        "cuda/terms_row.cuh",
        "if (sums_.logp != sums_.logp) loss_.by.g = NAN;",
        "",
    ),
    "logprob of an ignored target": ("cuda/terms_row.cuh", "reads && given ?", "reads ?"),
    "logits left for logprobs": (
        "cuda/terms_row.cuh",
        "for (int k = first; k < num(); k += step) {",
        "if (first == 0) {\n            const int k = 0;",
    ),
    "entropy nobody asked for": ("cuda/terms_row.cuh", "terms.entropy ? moment_ : 0.f", "moment_"),
    "zeros scaled": ("cuda/scale.cuh", "x == 0.f ? x : x * scale", "x * scale"),
    # the exact tail
    "target in the sum": (
        "cuda/two_sweeps.cuh",
        "left_out_vector = span.vector_of(left_out);",
        "left_out_vector = -1;",
    ),
    "target's chunk whole": (
        "cuda/two_sweeps.cuh",
        "for (int stop = left_out_vector < 0 ? span.vectors : left_out_vector;",
        "for (int stop = span.vectors;",
    ),
    "nothing after the target's chunk": (
        "cuda/two_sweeps.cuh",
        "v += step, stop = span.vectors)",
        "v += span.vectors, stop = span.vectors)",
    ),
    "target's chunk until its end": ("cuda/two_sweeps.cuh", "v - thread < span.vectors;", "v - thread < stop;"),
    "target's vector in its chunk": ("cuda/two_sweeps.cuh", "&& at != left_out_vector;", ";"),
    "target's whole vector left out": ("cuda/two_sweeps.cuh", "< 0 ? 0 : kWidth<T>)) {", "< 0 ? 0 : 0)) {"),
    "target added beside its vector": (
        "cuda/two_sweeps.cuh",
        "if (j != left_out) acc.add(",
        "if (beside < 0 ? j != left_out : true) acc.add(",
    ),
    "target added at the edge": (
        "cuda/two_sweeps.cuh",
        "if (j != left_out) acc.add(",
        "if (beside < 0 || j != left_out) acc.add(",
    ),
    "wrong vector left out": ("cuda/two_sweeps.cuh", "? body / kWidth<T> : -1;", "? j / kWidth<T> : -1;"),
    "others' maximum kept where they have no mass": (
        "cuda/plain_row.cuh",
        "sum_ == 0.f ? target_ : all.max",
        "all.max",
    ),
    "others' maximum kept, with terms": (
        "cuda/terms_row.cuh",
        "single() && sum_ == 0.f ? target_ : all.max",
        "all.max",
    ),
    "lead ignored in the dense elements": (
        "cuda/plain_row.cuh",
        "return fmaxf(maximum_, target_);",
        "return maximum_;",
    ),
    "lead ignored with terms": ("cuda/terms_row.cuh", "single() ? fmaxf(maximum_, target_) : maximum_", "maximum_"),
    "lead ignored in the moment": ("loss.h", "moment - times(out.lead, sum)", "moment"),
    "target left out of the moment": ("loss.h", " + times(out.own, out.behind);", ";"),
    "target left out of the drift": (
        "cuda/terms_row.cuh",
        "(left_out >= 0 ? distance_from(maximum_, target_, z) : 0.f)",
        "0.f",
    ),
    "log of 1 + rest": ("loss.h", "out.own == 1.f ? log1pf(out.rest) : logf(out.total)", "logf(out.total)"),
    "log1p where the target is not first": (
        "loss.h",
        "out.own == 1.f ? log1pf(out.rest) :",
        "true ? log1pf(out.rest) :",
    ),
    "1 - p by subtraction": (
        "loss.h",
        "softmax.rest / softmax.total, softmax.logprob()",
        "1.f - softmax.own / softmax.total, softmax.logprob()",
    ),
    "e^-lead in one step": ("loss.h", "out.rest = half * (half * sum);", "out.rest = half * half * sum;"),
    "infinite distance from a mask": (
        "loss.h",
        "return distance == INFINITY && target != INFINITY ?",
        "return false ?",
    ),
    "0 * inf in the moment": (
        "loss.h",
        "times(half, times(half, moment - times(out.lead, sum)))",
        "half * (half * (moment - out.lead * sum))",
    ),
    "lse by way of a mask": (
        "cuda/terms_row.cuh",
        "row_seen(z.level(raw_top()) * z.scale, softmax_",
        "row_seen(z.level(maximum_) * z.scale + softmax_.lead, softmax_",
    ),
    # on chip: copies and waits
    "wait one group short": (
        "cuda/on_chip.cuh",
        "wait_copies<kGroups - 1>();\n#pragma",
        "wait_copies<kGroups>();\n#pragma",
    ),
    "groups not filled up": ("cuda/on_chip.cuh", "        commit_nothing(kGroups - chunks_);\n", ""),
    "no group closed in sweep 1": (
        "cuda/on_chip.cuh",
        "            commit_copies,\n",
        "            [] {},\n",
    ),
    "a chunk's group left open": (
        "cuda/on_chip.cuh",
        "        const auto go_on = [&] {\n            commit_copies();\n",
        "        const auto go_on = [&] {\n",
    ),
    "copied to before it is read": (
        "cuda/on_chip.cuh",
        "            if (c == chunks_) break;\n            const auto inside",
        "            if (c == chunks_) break;\n"
        "            copy_chunk(coming, from, next_slots, c);\n            const auto inside",
    ),
    "no copies after a row that is not mapped": (
        "cuda/kernels.cuh",
        "if (!from_slots) chip.fetch(next, coming.span);",
        "",
    ),
    "copied twice": (
        "cuda/kernels.cuh",
        "if (!from_slots) chip.fetch(next, coming.span);",
        "chip.fetch(next, coming.span);",
    ),
    "slots under the scratch": (
        "cuda/kernels.cuh",
        "reinterpret_cast<uint4*>(&shared + 1)",
        "reinterpret_cast<uint4*>(&shared)",
    ),
    "another thread's slots": (
        "cuda/on_chip.cuh",
        "in_line(row + share.head)) % kWarp;",
        "in_line(row + share.head)) % (kWarp / 2);",
    ),
    "another warp's slots": (
        "cuda/on_chip.cuh",
        "(threadIdx.x + in_line(row + share.head)) % kWarp;",
        "threadIdx.x % kWarp + in_line(row + share.head);",
    ),
    "announced, and there is no row": ("cuda/on_chip.cuh", "16 * min_of(vectors, span.vectors)", "16 * vectors"),
    "announced beyond the row": (
        "cuda/on_chip.cuh",
        "16 * min_of(vectors, span.vectors)",
        "16 * (span.vectors > 0 ? vectors : 0)",
    ),
    # on chip: slots in the phase of what is copied into them
    "slots not turned": (
        "cuda/on_chip.cuh",
        "(threadIdx.x + in_line(row + share.head)) % kWarp;",
        "threadIdx.x % kWarp;",
    ),
    "slots not turned when they are filled": (
        "cuda/on_chip.cuh",
        "slots = slots_of(row, share);\n        for (int c",
        "slots = slots_ + threadIdx.x % kWarp;\n        for (int c",
    ),
    "slots not turned when they are summed": (
        "cuda/on_chip.cuh",
        "slots = slots_of(row, share);\n        FoldedOnline",
        "slots = slots_ + threadIdx.x % kWarp;\n        FoldedOnline",
    ),
    "slots not turned when they are mapped": (
        "cuda/on_chip.cuh",
        "(lane - lines + in_line(in + share.head)) &",
        "(lane - lines) &",
    ),
    "slots not turned when they are filled again": (
        "cuda/on_chip.cuh",
        "next_slots = slots_of(next, coming);",
        "next_slots = slots_ + threadIdx.x % kWarp;",
    ),
    "slots mapped by where the row begins": (
        "cuda/on_chip.cuh",
        "(lane - lines + in_line(in + share.head)) &",
        "(lane - lines + in_line(in)) &",
    ),
    "slots filled in this row's phase": (
        "cuda/on_chip.cuh",
        "uint4* next_slots = slots_of(next, coming);",
        "uint4* next_slots = slots_of(in, share);",
    ),
    "slots mapped in the gradient's phase": (
        "cuda/on_chip.cuh",
        "(lane - lines + in_line(in + share.head)) &",
        "lane &",
    ),
    # on chip: stores of whole lines
    "turned by the logits' lines": (
        "cuda/on_chip.cuh",
        "lines = in_line(out + share.head);",
        "lines = in_line(in + share.head);",
    ),
    "stores by the order of the sums on chip": (
        "cuda/on_chip.cuh",
        "lines = in_line(out + share.head);",
        "lines = 0;",
    ),
    "no lane behind": ("cuda/on_chip.cuh", "behind = lane < lines;", "behind = false;"),
    "one lane too many behind": ("cuda/on_chip.cuh", "behind = lane < lines;", "behind = lane <= lines;"),
    "lanes behind with their slots": ("cuda/on_chip.cuh", "behind ? slot - kWarp : slot", "slot"),
    "the last vectors of another piece": (
        "cuda/on_chip.cuh",
        "behind ? Share<T>::kPiece : 0,",
        "behind ? share.step : 0,",
    ),
    "a turned chunk's end by the sums'": (
        "cuda/on_chip.cuh",
        "return chunk * share.step + first + at(u) < share.vectors;",
        "return share.has(chunk, u);",
    ),
    "target's element by who has summed it": (
        "cuda/kernels.cuh",
        "Owner{now.left_out_here.writer}",
        "Owner{now.left_out_here.owner}",
    ),
    "filled while the warp still maps": (
        "cuda/on_chip.cuh",
        "                if (next) {\n                    __syncwarp();\n",
        "                if (next) {\n",
    ),
    "filled while the warp still maps a row's end": (
        "cuda/on_chip.cuh",
        "            __syncwarp();\n#pragma unroll 1\n",
        "#pragma unroll 1\n",
    ),
    "slots for no more vectors than there are": (
        "cuda/launch.cu",
        "return over(elements * element_bytes / kVector * kVector, kPiece) * kPiece;",
        "return elements * element_bytes / kVector * kVector;",
    ),
    # on chip: masks, edges and the rest
    "the last row's mask": (
        "cuda/kernels.cuh",
        "if (problem.reads(slot, aim(slot, i))) {",
        "if (problem.reads(slot == 0 ? 2 : slot - 1, aim(slot == 0 ? 2 : slot - 1, i))) {",
    ),
    "a masked row copied": ("cuda/kernels.cuh", "if (problem.reads(slot, aim(slot, i))) {", "if (i < n) {"),
    "a whole chunk at the row's end": ("cuda/on_chip.cuh", "warp - kPiece + step)", "warp - 1 + step)"),
    "the last chunk left out": ("cuda/on_chip.cuh", "warp - 1 + step)", "warp - kPiece + step)"),
    "the next row's end taken for this one's": (
        "cuda/on_chip.cuh",
        "next ? min_of(share.whole, coming.whole) : share.whole",
        "share.whole",
    ),
    "this row's end taken for the next one's": (
        "cuda/on_chip.cuh",
        "min_of(share.whole, coming.whole)",
        "coming.whole",
    ),
    "edges left out": ("cuda/on_chip.cuh", "if (on_edge && !owns_edge)", "if (false)"),
    "target at the edge added": ("cuda/on_chip.cuh", "if (on_edge && !owns_edge)", "if (on_edge)"),
    "edges not mapped": (
        "cuda/on_chip.cuh",
        "if (static_cast<int>(threadIdx.x) < share.edges) {\n            const int edge = share.edge",
        "if (false) {\n            const int edge = share.edge",
    ),
    "the rest not summed": (
        "cuda/on_chip.cuh",
        "            chunks_, share.some,\n",
        "            share.some, share.some,\n",
    ),
    "the rest not mapped": ("cuda/on_chip.cuh", "c >= chunks_; --c", "c > chunks_; --c"),
    "slots mapped in another phase": ("cuda/kernels.cuh", "&& skew_of<T>(logits, grad) == 0", ""),
    # on chip: the target
    "target's chunk taken whole": ("cuda/on_chip.cuh", "near ? left_out.vector >> log_step_ : -1;", "-1;"),
    "target's vector added": (
        "cuda/on_chip.cuh",
        " && c * share.step + share.first + u * kWarp != skipped;",
        ";",
    ),
    "target added with its vector": (
        "cuda/on_chip.cuh",
        "            if (i != left_out) add_to(",
        "            if (true) add_to(",
    ),
    "target's logit from its neighbour": ("cuda/on_chip.cuh", "found = x[i];", "found = x[i ^ 1];"),
    "target by another warp": ("cuda/on_chip.cuh", "warp + v % kWarp,", "v % kWarp,"),
    "the target's place left as it was": ("cuda/on_chip.cuh", "place_in_it(), lowest<T>())", "place_in_it(), T{})"),
    "another element's place taken": (
        "cuda/on_chip.cuh",
        "exchange_in_slot(slot_of_it(), place_in_it(),",
        "exchange_in_slot(slot_of_it(), place_in_it() ^ 1,",
    ),
    "the target's place taken before it has come": (
        "cuda/on_chip.cuh",
        "                wait_copies<kGroups - 1>();\n                if (owns) found(to",
        "                if (owns) found(to",
    ),
    "-inf counted where it is more than no mass": (
        "cuda/sums.cuh",
        "struct Moments {\n    static constexpr bool kMassOnly = false;",
        "struct Moments {\n    static constexpr bool kMassOnly = true;",
    ),
    "a vector left out of the slots and of the rest": (
        "cuda/on_chip.cuh",
        "takes = Sums::kMassOnly && near && apart < chunks_;",
        "takes = Sums::kMassOnly && near;",
    ),
    "one place for the targets of all rows": ("cuda/kernels.cuh", "shared.target[turn]", "shared.target[0]"),
    # on chip: the fold
    "far rows folded": ("cuda/kernels.cuh", "near = row.near();", "near = true;"),
    "a far target folded": ("cuda/row.cuh", " & Folded<Z>(z, top).near();", ";"),
    "a row without mass folded": ("cuda/row.cuh", "return (sum > 0.f) & ", "return "),
    "far further out": ("cuda/sums.cuh", "kFar = 262144.f", "kFar = 268435456.f"),
    "the top's rounding left in the sums": (
        "cuda/on_chip.cuh",
        "sums_.rescale(-exponent_.excess(), exponent_.correction());",
        "",
    ),
    "the top's rounding left in the gradient": ("cuda/plain_row.cuh", " * exponent.correction();", ";"),
    "maximum of half a vector": ("cuda/vector.cuh", "larger(v.z, v.w)", "larger(v.x, v.y)"),
    # on chip: cheap levels
    "a cheap tanh too far": ("cuda/transform.cuh", "room ? kCheap * softcap :", "room ? 2.f * softcap :"),
    "a cheap tanh of half its range": ("cuda/on_chip.cuh", " & (min.get() >= -z_.cheap_to)", ""),
    "costly chunks mapped as cheap ones": ("cuda/on_chip.cuh", "min_of(whole, c + zeros_below(costly >> c))", "whole"),
    "costly chunks of the rest mapped as cheap ones": ("cuda/on_chip.cuh", "&& !(costly >> c & 1)", ""),
    "a maximum too far above": ("cuda/on_chip.cuh", "fminf(z_.cheap_to, z_.little_above(from))", "z_.cheap_to"),
    "cheap exponents in units of the softcap": (
        "cuda/transform.cuh",
        "terms_[i] = z.exponent(z.terms[i]);",
        "terms_[i] = z.terms[i];",
    ),
    # on chip: two elements at a time
    "one sum of a pair": ("cuda/sums.cuh", "sum += pairs.sum.x + pairs.sum.y;\n", "sum += pairs.sum.x;\n"),
    "one sum of a pair without moments": (
        "cuda/sums.cuh",
        "{ sum += pairs.sum.x + pairs.sum.y; }",
        "{ sum += pairs.sum.x; }",
    ),
    "no moments for the entropy": ("cuda/kernels.cuh", "mass_only = !p.problem.terms.entropy && ", "mass_only = "),
    "no drift for label smoothing": (
        "cuda/kernels.cuh",
        "mass_only = !p.problem.terms.entropy && p.problem.terms.label_smoothing == 0.f;",
        "mass_only = !p.problem.terms.entropy;",
    ),
    "one moment of a pair": ("cuda/sums.cuh", "pairs.moment.x + pairs.moment.y", "pairs.moment.x"),
    "one drift of a pair": ("cuda/sums.cuh", "pairs.drift.x + pairs.drift.y", "pairs.drift.x"),
    "one element of a pair counted": ("cuda/sums.cuh", "count += 2.f;", "count += 1.f;"),
    "half of the pairs that are summed together": ("cuda/on_chip.cuh", "i == 0 && u % kTogether == 0", "i == 0"),
    "half of a chunk's pairs": ("cuda/on_chip.cuh", "if (u == kTogether - 1)", "if (u % kTogether == kTogether - 1)"),
    "the second of a pair mapped as the first": (
        "cuda/on_chip.cuh",
        "pair.y;\n            }\n        } else {",
        "pair.x;\n            }\n        } else {",
    ),
    # on chip: levels that are kept
    "no level kept": ("cuda/on_chip.cuh", "write_slot(slots + place(c, u), levels[u]);", ";"),
    "kept levels mapped as logits": ("cuda/on_chip.cuh", "either<kKeepsLevels<Z, T>>(kept, cheap)", "cheap"),
    "the row's end mapped as logits": ("cuda/on_chip.cuh", "kKeepsLevels<Z, T> && is_cheap(c)", "false"),
    "the row's end mapped as levels": ("cuda/on_chip.cuh", "kKeepsLevels<Z, T> && is_cheap(c)", "kKeepsLevels<Z, T>"),
    "sums from an old maximum": ("cuda/on_chip.cuh", "if constexpr (Z::kCostly) rise(max_);", ""),
    "sums from 0 on, whatever the softcap": (
        "cuda/transform.cuh",
        "return kLog2e * scale <= 60.f ? 0.f : kFloor;",
        "return 0.f;",
    ),
    # on chip: numbers of the tokens ahead
    "numbers over this token's": (
        "cuda/kernels.cuh",
        "fetch_token(ring_slot(slot, 3), turns.row());",
        "fetch_token(slot, turns.row());",
    ),
    "numbers over the next token's": (
        "cuda/kernels.cuh",
        "fetch_token(ring_slot(slot, 3), turns.row());",
        "fetch_token(next_slot, turns.row());",
    ),
    "numbers over those of the row after the next": (
        "cuda/kernels.cuh",
        "fetch_token(ring_slot(slot, 3), turns.row());",
        "fetch_token(ring_slot(slot, 2), turns.row());",
    ),
    "a ring of one row less": ("cuda/token_ring.cuh", "kRingTokens = 4;", "kRingTokens = 3;"),
    "numbers one row ahead": (
        "cuda/kernels.cuh",
        "            fetch_token(ring_slot(slot, 3), turns.row());\n            turns.advance();\n",
        "            turns.advance();\n            fetch_token(ring_slot(slot, 3), turns.row());\n",
    ),
    "numbers beyond the last row": ("cuda/kernels.cuh", "if (i < n) ring.fetch(slot, i);", "ring.fetch(slot, i);"),
    "no wait in a masked row": ("cuda/kernels.cuh", "            chip.wait_first();\n", ""),
    "no barrier in a masked row": (
        "cuda/kernels.cuh",
        "            __syncthreads();\n        }\n        // One barrier ago",
        "        }\n        // One barrier ago",
    ),
    "targets of 32 bits side by side": (
        "cuda/token_ring.cuh",
        "reinterpret_cast<int32_t*>(indices_ + slot)",
        "reinterpret_cast<int32_t*>(indices_) + slot",
    ),
    "targets of 32 bits read as 64": (
        "cuda/token_ring.cuh",
        "given_.is_int64 ? indices_[i] : *reinterpret_cast<const int32_t*>(indices_ + i);",
        "indices_[i];",
    ),
    "targets of 64 bits read as 32": (
        "cuda/token_ring.cuh",
        "given_.is_int64 ? indices_[i] : *reinterpret_cast",
        "*reinterpret_cast",
    ),
    "shares of other rows": (
        "cuda/token_ring.cuh",
        "shares_ + slot, given_.shares + i",
        "shares_ + slot, given_.shares",
    ),
    "share not copied": ("cuda/token_ring.cuh", "if (given_.shares) copy_async(", "if (false) copy_async("),
    "no share where none is given": ("cuda/token_ring.cuh", "for (float& share : shares_) share = 1.f;", ""),
    "several targets at a place of the ring": (
        "cuda/kernels.cuh",
        "return Row::kSingle || p.problem.targets.single() ? slot : i;",
        "return slot;",
    ),
    "a constant number for the first token": (
        "cuda/token_ring.cuh",
        "for (float& each : column.numbers) each = number;",
        "column.numbers[0] = number;",
    ),
    "a number in another's column": (
        "cuda/token_ring.cuh",
        "take(5, from.entropy_coef, terms.entropy_coef)",
        "take(5, from.entropy_coef, terms.kl_coef)",
    ),
    "a column for two numbers": ("cuda/token_ring.cuh", "take(4, from.kl_coef,", "take(3, from.kl_coef,"),
    "no thread for the last column": (
        "cuda/token_ring.cuh",
        "if (lane < kColumns) {",
        "if (lane < kColumns - 1) {",
    ),
    "numbers without their stride": ("cuda/token_ring.cuh", "source.data + i * source.stride", "source.data + i"),
    # on chip: the next row, prepared by one warp
    "prepared before its numbers are seen": (
        "cuda/kernels.cuh",
        "        __syncwarp();\n        const int i = shared",
        "        const int i = shared",
    ),
    "prepared over this row": ("cuda/kernels.cuh", "prepare(next_slot);", "prepare(slot);"),
    "prepared before its numbers have come": (
        "cuda/kernels.cuh",
        "prepare(next_slot);",
        "prepare(ring_slot(slot, 2));",
    ),
    "the gradient's row for the logits'": (
        "cuda/kernels.cuh",
        "to.grad = row_of(p.grad, i);",
        "to.grad = row_of(p.logits, i);",
    ),
    "a loss nobody stores": ("cuda/kernels.cuh", "if (first_lane && team.rank() == 0)", "if (false)"),
    # on chip: rows in turns
    "a place beyond the turn": ("cuda/kernels.cuh", "        if (place_ >= teams_) place_ -= teams_;\n", ""),
    "the place after the last": ("cuda/kernels.cuh", "if (place_ >= teams_)", "if (place_ > teams_)"),
    "a row left out between turns": ("cuda/kernels.cuh", "first_ += teams_;", "first_ += teams_ + 1;"),
    "the first row twice": (
        "cuda/kernels.cuh",
        "++slot, turns.advance()) fetch_token",
        "++slot) fetch_token",
    ),
    "one level of strides": (
        "cuda/kernels.cuh",
        "(i < rows.inner ? i * rows.inner_stride : rows.offset(i))",
        "i * rows.inner_stride",
    ),
    # the mean's normaliser
    "weights left out of the normaliser": (
        "cuda/tokens.cuh",
        "const float weight = weights.at(row);",
        "const float weight = 1.f;",
    ),
    "a mean not divided": ("cuda/kernels.cuh", "if (threadIdx.x == 0) ring.set_denominator(normaliser);", ""),
    "a mean's normaliser for the first token": (
        "cuda/token_ring.cuh",
        "{ set(problem.denominator, denominator); }",
        "{ problem.denominator.numbers[1] = denominator; }",
    ),
    "a mean's normaliser nowhere": (
        "cuda/kernels.cuh",
        "if (threadIdx.x == 0 && blockIdx.x == 0) *p.loss = normaliser;",
        "",
    ),
    "a token counted by eight threads": (
        "cuda/tokens.cuh",
        "const int64_t step = blockDim.x;",
        "const int64_t step = 1;",
    ),
    "tokens counted beyond the end": (
        "cuda/tokens.cuh",
        "sum += first + u * step < n ? numbers[u] : 0.f;",
        "sum += numbers[u];",
    ),
    # pairs of blocks
    "partials told to the own block": (
        "cuda/block.cuh",
        "team.tell(partials[team.rank() * warps + warp], x);",
        "partials[team.rank() * warps + warp] = x;",
    ),
    "both blocks' partials in one place": ("cuda/block.cuh", "partials[team.rank() * warps + warp]", "partials[warp]"),
    "one block's partials reduced": ("cuda/block.cuh", "count = team.size() * warps;", "count = warps;"),
    "the target's logit told to the own block": ("cuda/kernels.cuh", "team.tell(target, logit);", "target = logit;"),
    "the target's logit told to the other block": (
        "cuda/team.cuh",
        "        place = x;\n        if (size_ == 2) *place_of(&place, 1 - rank()) = x;",
        "        (size_ == 2 ? *place_of(&place, 1 - rank()) : place) = x;",
    ),
    "told to itself": ("cuda/team.cuh", "place_of(&place, 1 - rank())", "place_of(&place, rank())"),
    "a block's barrier for a pair": ("cuda/team.cuh", "            pair_barrier();", "            __syncthreads();"),
    "a pair's barrier for a block": (
        "cuda/team.cuh",
        "        if (size_ == 1)\n            __sync",
        "        if (false)\n            __sync",
    ),
    "told before the other block has begun": (
        "cuda/kernels.cuh",
        "    team.barrier();  // of a pair: both have begun\n",
        "    __syncthreads();\n",
    ),
    "the first half twice": ("cuda/team.cuh", "Part{half, vocab - half}", "Part{0, half}"),
    "the second half as long as the first": ("cuda/team.cuh", "Part{half, vocab - half}", "Part{half, half}"),
    "halves of a row without its last element": ("cuda/team.cuh", "Part{half, vocab - half}", "Part{half, vocab / 2}"),
    "a half longer than the row": ("cuda/team.cuh", "half = line < vocab ? line : vocab;", "half = line;"),
    "slots for half a row": ("cuda/launch.cu", "return over(vocab / 2, line) * line;", "return vocab / 2;"),
    "the element after a block's": ("cuda/team.cuh", "j - first < size ?", "j - first <= size ?"),
    "a block's first element not its own": ("cuda/team.cuh", "return first <= j &&", "return first < j &&"),
    "the row's element taken for the part's": (
        "cuda/kernels.cuh",
        "part.index_of(row.left_out), to.grad);",
        "row.left_out, to.grad);",
    ),
    "both halves at the row's beginning": ("cuda/kernels.cuh", "rows.offset(i)) + part.first;", "rows.offset(i));"),
    "a whole row copied": ("cuda/kernels.cuh", "Span<T>(to.logits, part.size);", "Span<T>(to.logits, vocab);"),
    "a whole far row summed": (
        "cuda/kernels.cuh",
        "sum_row<Sums>(logits, part.size,",
        "sum_row<Sums>(logits, vocab,",
    ),
    "a whole row of zeros": ("cuda/kernels.cuh", "zero_row(grad, part.size);", "zero_row(grad, vocab);"),
    "a whole masked row of zeros": (
        "cuda/kernels.cuh",
        "zero_row(in_global(now.grad), part.size);",
        "zero_row(in_global(now.grad), vocab);",
    ),
    "a row's partials over the normaliser's": (
        "cuda/kernels.cuh",
        "        team.barrier();  // its partials lie",
        "        // its partials lie",
    ),
    "the other block's partials over the normaliser's": (
        "cuda/kernels.cuh",
        "        team.barrier();  // its partials lie",
        "        __syncthreads();  // its partials lie",
    ),
    "no zeros for a masked row": ("cuda/kernels.cuh", "zero_row(in_global(now.grad), part.size);", ""),
    "no zeros for a row without a gradient": ("cuda/kernels.cuh", "if (logits) zero_row(", "if (false) zero_row("),
    "a whole row mapped": (
        "cuda/kernels.cuh",
        "map_row(logits, grad, part.size,",
        "map_row(logits, grad, vocab,",
    ),
    "pairs numbered as blocks": ("cuda/team.cuh", "size_ == 1 ? blockIdx.x : blockIdx.x / 2", "blockIdx.x"),
    "pairs counted as blocks": ("cuda/team.cuh", "size_ == 1 ? gridDim.x : gridDim.x / 2", "gridDim.x"),
    # forward only
    "far rows folded in stats": ("cuda/kernels.cuh", "seen = row.near();", "seen = true;"),
    # batch invariance
    "threads chosen by the number of rows": (
        "cuda/launch.cu",
        "* kWarp, max_threads));",
        "* kWarp, rows.n == 1 ? 32 : max_threads));",
    ),
    "rows in flight chosen by the number of rows": (
        "cuda/launch.cu",
        "max_rows == 1 ? 1 :",
        "rows.n == 1 ? 4 : max_rows == 1 ? 1 :",
    ),
    "a row's order by its place": (
        "cuda/two_sweeps.cuh",
        "const int thread = threadIdx.x, step = kUnroll * blockDim.x, left_out_vector",
        "const int thread = (threadIdx.x + blockIdx.x % 2) % blockDim.x, step = kUnroll * blockDim.x, left_out_vector",
    ),
}

# Wrong by the order of accesses alone: values may come out right where fibers happen to run well. Some of BUGS, with a
# barrier each that is not there, and others that no value shows.
RACES = {
    name: BUGS[name]
    for name in (
        "barrier dropped",
        "partials used again too early",
        "targets before the others are done",
        "no barrier in a masked row",
        "filled while the warp still maps",
        "filled while the warp still maps a row's end",
        "prepared before its numbers are seen",
        "a row's partials over the normaliser's",
        "the other block's partials over the normaliser's",
    )
} | {
    "no barrier before the first row's token": (
        "cuda/kernels.cuh",
        "    team.barrier();  // of a pair: both have begun\n",
        "",
    ),
    "no barrier before the first row": ("cuda/kernels.cuh", "    __syncthreads();\n    chip.fetch", "    chip.fetch"),
    "a token prepared while others look": ("cuda/kernels.cuh", "        __syncwarp();  // all have read the row\n", ""),
    "a target that is there twice written twice": ("cuda/terms_row.cuh", "if (!written) assign", "assign"),
    "one place for the target of every row": ("cuda/kernels.cuh", "shared.target[turn]", "shared.target[0]"),
    "a ring of three": ("cuda/token_ring.cuh", "kRingTokens = 4", "kRingTokens = 3"),
}

# What is read is thrown away: only AddressSanitizer can tell. And the function that it names.
UNSEEN = {
    "skewed loads beyond the row": "load_skewed",
    "the next row's end taken for this one's": "host_cuda::Copies",
    "announced beyond the row": "prefetch",
    "numbers beyond the last row": "copy_async",
}


@pytest.mark.parametrize("bug", BUGS | RACES)
def test_bug_is_still_one(bug):
    compiler.edited(*(BUGS | RACES)[bug])


@pytest.mark.seeded_bugs
@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_caught(bug, entry, cases, tmp_path):
    sanitize = bug in UNSEEN
    library = compiler.build(tmp_path, entry, sanitize=sanitize, edit=BUGS[bug])
    done = compiler.sweep(library, cases, sanitize=sanitize, first=60)
    assert done.returncode != 0, "the sweep passes with this bug"
    assert not sanitize or UNSEEN[bug] in done.stderr, done.stderr[-3000:]


@pytest.mark.seeded_bugs
@pytest.mark.parametrize("bug", RACES)
def test_race_bug_is_caught(bug, entry, races, cases, tmp_path):
    done = compiler.sweep(compiler.build(tmp_path, entry, races, watch=True, edit=RACES[bug]), cases, first=36)
    assert "a race: " in done.stderr, done.stderr[-3000:]
