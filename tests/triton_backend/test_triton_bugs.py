"""Seeded bugs: each is one substitution in a copy of the kernels, and the checks below must notice every one."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import test_triton_tail as tail  # modules: what is imported by name is collected here, too
import test_triton_terms as terms
import test_triton_tokens as tokens
import torch
from triton_cases import (
    DEVICE,
    Case,
    assert_gradient,
    check_one_pass,
    check_terms,
    check_two_phase,
    one_shot,
    small_tiles,  # noqa: F401  (a fixture)
    terms_case,
)

from fused_losses.backends import triton as backend
from fused_losses.backends.triton import BACKEND
from fused_losses.problem import Terms

MUTANTS = [
    ("rows.py", "(offset + (VECTOR - 1)) // VECTOR * VECTOR", "offset + offset % VECTOR"),
    ("rows.py", "(vocab - head) // VECTOR", "vocab // VECTOR"),
    (
        "rows.py",
        "columns < tl.where(i < VECTOR, head, vocab)",
        "columns < tl.where(i < VECTOR, head, vocab + 1)",
    ),
    ("rows.py", "(row % inner) * inner_stride", "row * inner_stride"),
    ("rows.py", "tl.where(temperature > 0, tl.div_rn", "tl.where(temperature != 0, tl.div_rn"),
    ("rows.py", "(target >= 0) & (target < vocab)", "(target >= 0) & (target <= vocab)"),
    ("rows.py", "-3.4028234663852886e38", 'float("-inf")'),
    ("rows.py", "inside = columns < length - start", "inside = columns <= length - start"),
    ("rows.py", "(vary.to(tl.int64) >> place) & 1", "vary.to(tl.int64) & 1"),
    ("rows.py", "place = INPUTS + len(token.inputs) + i", "place = INPUTS + len(token.inputs) - 1 + i"),
    # The exact tail: the hole, what is left out of it, and what is made of the rest.
    ("rows.py", "(place >= 0) & (place < body)", "(place > 0) & (place < body)"),
    ("rows.py", "place // VECTOR * VECTOR, body", "place // VECTOR * VECTOR + VECTOR, body"),
    ("rows.py", "!= (hole - start) // VECTOR", "!= hole // VECTOR"),
    ("rows.py", "!= (hole - start) // VECTOR", "> -1"),
    ("rows.py", "return place, place < body", "return place, place <= body"),
    ("rows.py", "columns < vocab, in_hole)", "columns < vocab, i < 0)"),
    ("rows.py", "(i < 3 * VECTOR) & (place < body)", "i < 3 * VECTOR"),
    ("rows.py", "i - VECTOR + head + body, head + place)", "i - VECTOR + head + body, place)"),
    ("sums.py", "start += tl.where(i >= with_hole, TILE, 0)", "start += 0"),
    ("sums.py", "tl.where(i >= with_hole, TILE, 0)", "tl.where(i > with_hole, TILE, 0)"),
    ("sums.py", "tl.where(first, with_hole, full) * TILE", "full * TILE"),
    ("sums.py", "unmasked = full - waits.to(tl.int32)", "unmasked = full"),
    ("sums.py", "count -= (with_hole & (hole < full * PLAN.depth * LANES)).to(tl.int32)", "count -= 0"),
    ("sums.py", "count = body - tl.where(hole < body, PLAN.vector, 0)", "count = body"),
    ("sums.py", "alone = sums.sum == 0", "alone = sums.sum < 0"),
    ("sums.py", "tl.where(alone, target_logit, sums.peak)", "sums.peak"),
    ("sums.py", "drift += own", "drift += 0.0"),
    ("sums.py", "own = (target_y - maximum) * scale", "own = (target_y - sums.maximum) * scale"),
    ("stats.py", "counts = counts & (columns != target)", "counts = counts & (columns != target + 1)"),
    ("loss_and_grad.py", "exists & (side != target)", "exists & (side == side)"),
    ("loss_and_grad.py", "softmax.half * (softmax.half * dense.a)", "dense.a"),
    ("loss_and_grad.py", "tl.where(side == target, own, value)", "value"),
    ("loss_and_grad.py", "tl.maximum(sums.maximum, target_y) if ROW.single", "sums.maximum if ROW.single"),
    ("grad.py", "tl.maximum(maximum, target_y) if ROW.single", "maximum if ROW.single"),
    ("tokens.py", "top = tl.maximum(maximum, target_y)", "top = maximum"),
    ("softmax.py", "lead = tl.maximum(distance, 0.0)", "lead = tl.maximum(distance, 0.0) * 0.0"),
    ("softmax.py", "behind = distance - lead", "behind = distance"),
    ("softmax.py", "half * (half * sum)", "half * sum"),
    ("softmax.py", "half * (half * sum)", "(half * half) * sum"),
    ("softmax.py", "half * (half * moment - (half * lead) * sum)", "half * (half * moment)"),
    ("softmax.py", "- (half * lead) * sum)", "- half * (lead * sum))"),
    ("softmax.py", "+ times(own, behind)", "+ 0.0"),
    ("softmax.py", "tl.where(own == 1, made_up, log_total)", "log_total"),
    ("softmax.py", "tl.where(own == 1, made_up, log_total)", "made_up"),
    ("softmax.py", "log_total * (rest / exact)", "log_total"),
    ("softmax.py", "tl.where(distance > -FLOOR, -FLOOR, distance)", "distance"),
    ("softmax.py", 'tl.where(target_y < float("inf"), distance, float("nan"))', "distance"),
    ("softmax.py", "softmax.rest * inverse,", "1.0 - softmax.own * inverse,"),
    ("softmax.py", "drawn = whole * target.others", "drawn = whole - whole * target.p"),
    ("terms_row.py", "softmax.lead + softmax.log_total - drift", "softmax.log_total - drift"),
    # Sums.
    ("sums.py", "return sum * shrink, moment", "return sum, moment"),
    ("sums.py", "(moment + tl.maximum(delta, LOWEST) * sum) * shrink", "moment * shrink"),
    ("sums.py", "tl.maximum(delta, LOWEST)", "delta"),
    ("sums.py", "drift += tl.maximum(delta, FLOOR) * count", "drift += 0.0 * delta"),
    ("sums.py", "tl.maximum(delta, FLOOR) * count", "delta * count"),
    ("sums.py", "e * tl.maximum(t, LOWEST)", "e * t"),
    ("sums.py", "tl.sum(tl.where(inside, t, 0.0), 0)", "tl.sum(t, 0)"),
    ("sums.py", "+ tl.sum(rest.to(tl.int32), 0)", "+ 0"),
    ("sums.py", "(full * TILE < length).to(tl.int32)", "(full * TILE > length).to(tl.int32)"),
    ("sums.py", 'other=float("-inf")', "other=0.0"),
    ("sums.py", "(maximum - top) * scale", "(maximum - maximum) * scale"),
    ("sums.py", "tl.maximum(maximum, tl.max(side_y, 0))", "maximum + 0.0"),
    ("sums.py", "        sum += more\n        moment += more_moment", "        moment += more_moment"),
    ("stats.py", "maximum = sums.peak if ROW.capped", "maximum = sums.maximum if ROW.capped"),
    ("stats.py", "moment = sums.moment * LN2", "moment = sums.moment"),
    ("stats.py", "others) * LN2 if", "others) if"),
    ("stats.py", "read = read & (at(token.weights", "read = read | (at(token.weights"),
    (
        "softcap.py",
        "(1.0 - 2.0 * r).to(tl.int32, bitcast=True) | sign",
        "(1.0 - 2.0 * r).to(tl.int32, bitcast=True)",
    ),
    ("softcap.py", "2.100363933e-2", "2.1e-1"),
    ("softcap.py", "return inverse_t * softcap,", "return inverse_t,"),
    ("softcap.py", 'return tl.where(inside, y, float("-inf"))', "return y"),
    # The gradient.
    ("softmax.py", "drawn = whole * target.others", "drawn = whole * (1.0 - target.p.to(tl.bfloat16).to(tl.float32))"),
    ("softmax.py", "drawn = whole * target.others", "drawn = target.others"),
    ("softmax.py", "return by.g * drawn\n", "return by.g * target.p\n"),
    ("softmax.py", "by.zeta - by.g * whole + mean", "by.zeta - by.g + mean"),
    ("softmax.py", "by.g * whole + mean)", "by.g * whole)"),
    ("softmax.py", "slope * by.s)", "by.s)"),
    ("softmax.py", "dense.a + dense.b * tl.maximum(t, LOWEST)", "dense.a + dense.b * t"),
    ("softmax.py", "tl.maximum(target.distance, LOWEST) - mean", "target.distance - mean"),
    ("softmax.py", "tl.abs(by.zeta) + tl.abs(by.s)", "0.0"),
    ("softmax.py", "return tl.where(a == 0, 0.0, tl.where(b == 0, 0.0, a * b))", "return a * b"),
    ("softmax.py", "value *= slope", "value *= 1.0"),
    ("softcap.py", "far), r - r * r", "far), 0.25 - 0.25 * far * far"),
    ("softcap.py", "inverse_t * 4.0 if", "inverse_t if"),
    ("grad.py", "* (slope * target_slope)", "* target_slope"),
    ("grad.py", "is_any(nowhere, ROW)", "is_any(nowhere & (share == 0), ROW)"),
    ("softmax.py", "y, slope = squash_with_slope(x, inverse_cap, ROW)", "y, slope = x, 1.0"),
    ("grad.py", "(target >= head + start)", "(target > head + start)"),
    ("grad.py", "owner = tl.where(in_body, owner, start == 0)", "owner = owner & in_body"),
    ("grad.py", "stored = owner & valid", "stored = owner"),
    ("grad.py", "tl.where(x == 0, x, x * factor)", "x * factor"),
    ("loss_and_grad.py", "inside = columns < length - full", "inside = columns <= length - full"),
    ("loss_and_grad.py", "active = read & (weight != 0)", "active = read"),
    (
        "loss_and_grad.py",
        "body_pointer(grad, grad_offset, head, PLAN.aligned, PLAN)",
        "body_pointer(grad, offset, head, PLAN.aligned, PLAN)",
    ),
    ("loss_and_grad.py", "if coefficients == 0:", "if not read:"),
    ("loss_and_grad.py", "own *= slope * target_slope", "own *= target_slope"),
    ("loss_and_grad.py", "top * unit,", "top * inverse_t,"),
    # Terms.
    ("terms.py", 'tl.where(difference == float("-inf"), 0.0, difference)', "difference"),
    ("terms.py", "tl.where(flows, both, slope)", "both"),
    ("terms.py", "h, zeta = nan_unless(valid, h, zeta)", "h, zeta = h, zeta"),
    ("terms.py", "g = (1.0 - terms.label_smoothing) * g", "g = g"),
    ("terms.py", "s = -smoothing / vocab", "s = -smoothing"),
    ("terms_row.py", "logp = tl.where(given, target.logp, 0.0)", "logp = target.logp"),
    ("terms_row.py", "tl.where(share != 0, share * logp, 0.0)", "share * logp"),
    ("terms_row.py", "softmax.log_total - softmax.mean", "softmax.log_total + softmax.mean"),
    ("terms_row.py", "- drift / vocab", "- drift"),
    ("terms_row.py", "sums.drift * LN2", "sums.drift"),
    ("terms_row.py", "sums.moment * LN2", "sums.moment"),
    ("targets.py", "given = target != ignore_index", "given = target >= 0"),
    ("targets.py", "range(0, num_targets, CHUNK)", "range(0, CHUNK, CHUNK)"),
    ("targets.py", "given = given | (target", "given = (target"),
    # Objectives, and stage 2.
    ("objectives.py", "(advantages == 0) & (old_logprobs == old_logprobs)", "advantages == 0"),
    ("objectives.py", "tl.where(flows & (clipped == 0), value, 0.0)", "tl.where(flows, value, 0.0)"),
    ("objectives.py", "tl.where(flows & (clipped == 0), value, 0.0)", "tl.where(clipped == 0, value, 0.0)"),
    ("objectives.py", "tl.minimum(low, ceiling)", "low"),
    ("objectives.py", "(below | above) & (advantages == advantages)", "below | above"),
    ("objectives.py", "active & (derivative != 0)", "active"),
    ("plain_row.py", "nan_unless(logp == logp, loss, g)", "nan_unless(weight == weight, loss, g)"),
    ("plain_row.py", "tl.where(active, weight * loss, 0.0), scaled", "weight * loss, scaled"),
    ("tokens.py", "inside & given", "given"),
    ("tokens.py", "tl.where(empty, 0.0, total / tl.where(empty, 1.0, divisor))", "total / divisor"),
    ("tokens.py", "active = given & (weight != 0)", "active = given"),
    ("tokens.py", "logp = tl.where(read, target_seen(softmax).logp, 0.0)", "logp = target_seen(softmax).logp"),
    ("tokens.py", "read & (target != ignore_index)", "read"),
    ("tokens.py", "x += tl.where(share != 0, share * logp, 0.0)", "x += share * logp"),
    ("tokens.py", "x = tl.where(whole != 0, whole * logp, 0.0)", "x = logp"),
    ("tokens.py", "top * unit", "top * inverse_t"),
    ("tokens.py", "tl.where(read, seen.entropy, 0.0)", "seen.entropy"),
    # Statistics.
    ("sums.py", "squares = squares * (shrink * shrink)", "squares = squares * 1.0"),
    ("sums.py", "squares = squares * (shrink * shrink)", "squares = squares * shrink"),
    ("sums.py", "squares += more_squares", "squares += 0.0"),
    ("sums.py", "own = tl.minimum(own, -FLOOR)", "own += 0.0"),
    ("stats.py", "rival = sums.peak if ROW.capped else sums.maximum", "rival = sums.maximum"),
    ("stats.py", "return ((target_logit > rival) | first)", "return ((target_logit >= rival) | first)"),
    ("stats.py", "return ((target_logit > rival) | first)", "return (target_logit > rival)"),
    ("stats.py", "mask=columns < end", "mask=columns < end + 1"),
    ("stats.py", "mask=columns < end", "mask=columns < end - 1"),
    ("stats.py", "for start in range(0, end, PREFIX)", "for start in range(0, PREFIX, PREFIX)"),
    ("softmax.py", "total = others + own", "total = others"),
    ("softmax.py", "tl.exp(-2.0 * softmax.lead) * squares", "tl.exp(-softmax.lead) * squares"),
    ("softmax.py", "tl.where(softmax.own == 1, made_up, log_total) - 2.0", "log_total - 2.0"),
    ("tokens.py", "maximum * unit + drift / vocab", "top * unit + drift / vocab"),
    ("tokens.py", "tl.where(read, sum_squares, 0.0)", "sum_squares"),
    ("tokens.py", "tl.where(read, mean_logit, 0.0)", "mean_logit"),
    ("tokens.py", "tl.where(failed, 0.0, top1)", "top1 + tl.where(failed, 1.0, 0.0)"),
    ("tokens.py", 'mean_logit = tl.where(failed, float("nan"), ', "mean_logit = tl.where(failed, 0.0, "),
]


def kernels_folder() -> Path:
    return Path(importlib.import_module("fused_losses.triton_kernels.rows").__file__).parent


def edited(file: str, old: str, new: str) -> str:
    text = (kernels_folder() / file).read_text()
    assert text.count(old) == 1, f"{old!r} occurs {text.count(old)} times in {file}"
    return text.replace(old, new)


def use_mutant(directory: Path, file: str, old: str, new: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the backend at a copy of the kernels with one substitution in it."""
    package = f"mutant_{abs(hash((file, old, new)))}"
    source = kernels_folder()
    (directory / package).mkdir()
    for path in source.glob("*.py"):
        text = path.read_text()
        if path.name == file:
            text = edited(file, old, new)
        (directory / package / path.name).write_text(text)
    monkeypatch.syspath_prepend(directory)
    kernels = backend._kernels(package)
    monkeypatch.setattr(backend, "_kernels", lambda: kernels)


def check_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A short pass over what the other tests look at in breadth. First what watches the memory around the gradient: a
    bug that writes there may end the process if nobody stops it. Then the quick ones."""
    one_shot(monkeypatch, True)
    check_one_pass(Case("ppo", 51, torch.float32), False)
    check_one_pass(Case("cross_entropy", 24, torch.float32))
    one_shot(monkeypatch, False)
    check_one_pass(Case("ppo", 51, torch.float32), False, padding=3)
    tokens.test_objectives_at_hazards("importance_sampling", False)
    tokens.test_objectives_at_hazards("ppo", True)
    tokens.test_terms_at_hazards("k3", True)
    tokens.test_several_inputs()
    tokens.test_nan_row_is_nan_whatever_its_loss("ppo")
    tokens.test_clipped_token_survives_an_infinite_scale()
    for asked in (Terms(), Terms(entropy=True, entropy_coef=1.0)):
        tokens.test_unread_token_has_logprob_zero(False, asked)
    tokens.test_mean_over_several_targets()
    tokens.test_reduction(3)
    tokens.test_reduction(1)
    gradient = torch.tensor([[0.0, 2.0]], device=DEVICE)
    BACKEND.scale(gradient, torch.tensor([torch.inf], device=DEVICE))
    assert gradient.tolist() == [[0.0, torch.inf]]
    terms.test_stats_as_eager(None, 3)
    terms.test_stats_as_eager(2.0, 1)
    terms.test_slope_of_tanh()
    terms.test_statistics_as_eager(21, None)
    terms.test_statistics_as_eager(2600, 2.0)
    tail.test_what_each_of_the_others_adds_may_underflow()
    tail.test_target_outside_ends_no_other_row()
    one_shot(monkeypatch, True)
    tail.check_tail(5)
    one_shot(monkeypatch, False)
    tail.check_tail(67)
    check_two_phase(Case("ppo", 67, torch.float32))
    tail.check_tail(72, terms=Terms(entropy=True))
    terms.test_stages_as_eager()
    tail.test_what_a_target_may_hold(40, False, None, monkeypatch)
    one_shot(monkeypatch, True)
    check_terms(terms_case("all of a policy", "ppo", 51, torch.float32), padding=3)
    check_terms(terms_case("smoothed", "cross_entropy", 37, torch.float32, 20))
    one_shot(monkeypatch, False)
    check_terms(terms_case("capped smoothed", "cross_entropy", 67, torch.float32, 1))
    check_terms(terms_case("capped smoothed", "cross_entropy", 1, torch.float32))
    case = terms_case("smoothed", "cross_entropy", 67, torch.float32)
    for row in (0, 3):  # the others' maximum beside the target, in the vector that its row's sweep leaves out
        for neighbour in (case.targets[row] - 1, case.targets[row] + 1):
            case.logits[row, neighbour % 67] = case.logits[row].max() + 6.0
    case.logits[3] -= case.logits[3].mean()  # or its z-loss is so large that no other error shows
    check_terms(case)
    check_terms(terms_case("capped entropy", "cross_entropy", 40, torch.float32, 5))

    case = Case("cross_entropy", 19, torch.float32)  # two levels of strides, with room for whoever gets them wrong
    room = torch.full((2, 4096), 7.0, device=DEVICE)
    logits, gradient = room[0].as_strided((3, 4, 19), (95, 19, 1), 0), room[1, :228].view(3, 4, 19)
    logits.copy_(case.logits.view(3, 4, 19))
    BACKEND.loss_and_grad(logits, case.problem(), gradient)
    assert_gradient(gradient.view(12, 19), case.expected()[2], torch.float32)


def test_the_checks_pass_on_the_kernels_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_mutant(tmp_path, "rows.py", "import triton\n", "import triton\n", monkeypatch)
    check_everything(monkeypatch)


@pytest.mark.parametrize(("file", "old", "new"), MUTANTS, ids=range(len(MUTANTS)))
def test_bug_is_still_one(file: str, old: str, new: str) -> None:
    edited(file, old, new)


@pytest.mark.skipif(DEVICE.type != "cpu", reason="an access astray would end the CUDA context of all later tests")
@pytest.mark.seeded_bugs
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("file", "old", "new"), MUTANTS, ids=range(len(MUTANTS)))
def test_seeded_bug_is_caught(file: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_mutant(tmp_path, file, old, new, monkeypatch)
    with pytest.raises(Exception) as caught:  # wrong numbers, or no result at all
        check_everything(monkeypatch)
    assert not isinstance(caught.value, ImportError | SyntaxError)
