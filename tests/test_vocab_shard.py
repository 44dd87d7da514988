"""A vocabulary that is sharded over ranks: VocabShard, and LinearHead of a sharded weight, against one process."""

from __future__ import annotations

import pytest
import sharded
import torch
from cases import LOSSES, MODES
from ranks import SIZE, Ranks
from test_terms import OPTIONS, drawn

import fused_losses
from fused_losses import VocabShard
from fused_losses.backends import unusable

pytestmark = [
    pytest.mark.xdist_group("ranks"),  # whose processes start once
    pytest.mark.skipif(unusable("cpu", torch.device("cpu")) is not None, reason="backend cpu is unusable"),
]

WORLDS = tuple(range(1, SIZE + 1))
PLAIN = [(loss, "plain", {}) for loss in LOSSES]
WEIGHTED = [
    (loss, name, option)
    for loss in ("cross_entropy", "ppo")
    for name, option in {
        "weights": {"weights": lambda: torch.tensor([1.0, 0.3, 2.0, 0.0, 0.7, 1.1, 0.1])},
        "sum": {"reduction": "sum"},
        "denominator": {"denominator": 0.3},
        "a positive ignore_index": {"ignore_index": 3},
        "temperature per token": {"temperature": lambda: 0.5 + torch.rand(7)},
    }.items()
]
EXACT = {1: ("one pass",), 2: ("one pass", "none"), 3: tuple(MODES), 4: ("in place",)}  # modes by how many ranks
ALL_OPTIONS = [*PLAIN, *WEIGHTED, *OPTIONS]
ids = {"ids": lambda value: value if isinstance(value, str) else ""}


@pytest.mark.parametrize("objective, name, option", ALL_OPTIONS, **ids)
def test_float64_is_that_of_one_process(ranks: Ranks, objective, name, option):
    keywords = drawn(option)
    if isinstance(keywords.get("temperature"), torch.Tensor) and "logit_scale" in keywords:
        keywords["logit_scale"] = 0.5  # a column is float32, also one over a scale
    for world, modes in EXACT.items():
        if keywords.get("reduction") == "sum" or "denominator" in keywords:
            modes = tuple(mode for mode in modes if mode != "none")
        ranks(world, sharded.exact_modes, objective, keywords, modes)


@pytest.mark.parametrize("objective, name, option", ALL_OPTIONS, **ids)
def test_cpu_errs_as_one_process_does(ranks: Ranks, objective, name, option):
    ranks(3, sharded.held_modes, objective, drawn(option), torch.float32, ("one pass", "recompute"))
    ranks(2, sharded.held_modes, objective, drawn(option), torch.bfloat16, ("one pass", "in place"))


@pytest.mark.parametrize("name", sharded.COMPOSED)
def test_losses_of_two_phases_and_several_targets(ranks: Ranks, name):
    for world in WORLDS:
        ranks(world, sharded.exact_composed, name)
    for dtype in (torch.float32, torch.bfloat16):
        ranks(3, sharded.close_composed, name, dtype)


# ---- Where columns are, and what they hold ----

LAYOUTS: dict[str, tuple[list[tuple[int, int]], int]] = {
    "one rank": ([(0, 50)], 50),
    "one rank, padded": ([(0, 64)], 50),
    "one column each": ([(0, 1), (1, 1), (2, 1)], 3),
    "padded": ([(0, 16), (16, 16), (32, 16)], 41),
    "all but one padding": ([(0, 16), (16, 16), (32, 16)], 33),
    "in another order": ([(30, 20), (0, 7), (7, 23)], 45),
    "of four": ([(0, 16), (48, 16), (16, 16), (32, 16)], 50),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(ranks: Ranks, name):
    """Padding takes no part, and its gradient is exactly 0."""
    parts, vocab = LAYOUTS[name]
    for leading in ((5,), (2, 3)):
        ranks(len(parts), sharded.exact_layout, parts, vocab, leading)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_part_that_is_all_masked(ranks: Ranks, dtype):
    for world in (2, 3):
        ranks(world, sharded.masked_part, "eager", dtype)
        if dtype is torch.float32:
            ranks(world, sharded.masked_part, "cpu", dtype)


@pytest.mark.parametrize("on", ["eager", "cpu"])
@pytest.mark.parametrize(
    "function",
    [
        sharded.special_rows,
        sharded.sure_targets,
        sharded.seen_statistics,
        sharded.masked_part_of_smoothed_labels,
    ],
    ids=lambda f: f.__name__,
)
def test_of_every_number_of_ranks_and_backend(ranks: Ranks, function, on):
    for world in WORLDS:
        ranks(world, function, on)


@pytest.mark.parametrize(
    "function",
    [sharded.ignored, sharded.no_tokens, sharded.all_ignored, sharded.repeated, sharded.shapes, sharded.metrics],
    ids=lambda function: function.__name__,
)
def test_of_every_number_of_ranks(ranks: Ranks, function):
    for world in WORLDS:
        ranks(world, function)


# ---- Collectives ----


@pytest.mark.parametrize(
    "on, dtype", [("cpu", torch.float32), ("cpu", torch.bfloat16), ("eager", torch.float64)], ids=str
)
def test_collectives(ranks: Ranks, on, dtype):
    for world in (1, 3):
        ranks(world, sharded.collectives, on, dtype)


# ---- What is wrong ----

NAMED = {
    "overlap": "vocab_start: the parts of the vocabulary overlap",
    "gap": "leave a gap",
    "a dtype that is not taken": "local_logits must be float32, bfloat16 or float16, got torch.int32",
    "float64": "local_logits",
    "no tensor": "local_logits must be a tensor, got list",
    "no dimension": "local_logits must have shape",
    "no column": "vocab_start: a part without any class",
    "a start that is a float": "vocab_start must be an integer, got float",
    "a start that is a tensor": "vocab_start must be an integer, got a tensor",
    "a start that is a list": "vocab_start must be an integer, got list",
    "a start below 0": "vocab_start must be at least 0",
    "a start beyond the end": "vocab_start: a part without any class",
    "a size that is a float": "vocab_size must be an integer, got float",
    "a size of 0": "vocab_size greater than 0",
    "another size": "vocab_size",
    "a size that the parts do not reach": "vocab_size",
}


OF_ALL = ("overlap", "gap", "another size", "a size that the parts do not reach")  # no rank's own error


@pytest.mark.parametrize("kind", sharded.MISUSE)
@pytest.mark.parametrize("culprit", [None, 1], ids=["all ranks", "one rank"])
def test_what_is_wrong_is_named_on_all_ranks(ranks: Ranks, kind, culprit):
    if kind == "another size" and culprit is None:
        pytest.skip("the same on all ranks, it is right: the last column is padding")
    for rank, error in enumerate(ranks.errors(SIZE, sharded.misuse, kind, culprit)):
        assert error.kind in ("ValueError", "TypeError"), (rank, error)
        assert NAMED[kind] in error.message, (rank, error.message)
        if culprit is not None and rank != culprit and kind not in OF_ALL:
            assert "rank 1 of the group" in error.message, error.message


@pytest.mark.parametrize("kind", sharded.MISUSE_OF_HEAD)
def test_what_is_wrong_of_a_head_is_named_on_all_ranks(ranks: Ranks, kind):
    for error in ranks.errors(SIZE, sharded.misuse_of_head, kind):
        assert error.kind in ("ValueError", "TypeError") and f"{kind} must" in error.message, error.message


@pytest.mark.parametrize("kind", ["a list", "an int", "a size", "a smaller group"])
def test_a_wrong_group_is_named_on_all_ranks(ranks: Ranks, kind):
    for error in ranks.errors(2, sharded.wrong_group, kind):
        assert error.kind in ("ValueError", "TypeError")
        expected = (
            "vocab_size is 130, but the parts of the group's ranks end at 66" if kind[-1] == "p" else "group must be"
        )
        assert expected in error.message, error.message


def test_without_a_group(ranks: Ranks):
    with pytest.raises(ValueError, match="init_process_group"):
        fused_losses.cross_entropy(VocabShard(torch.zeros(2, 3), None, 0, 3), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("on", ["eager", "cpu"])
@pytest.mark.parametrize("target", [-1, -2, sharded.VOCAB, 2**40])
def test_a_target_out_of_range_is_refused_before_any_collective(ranks: Ranks, on, target):
    for several, validate in ((False, False), (True, True)):
        ranks(2, sharded.target_out_of_range, on, target, several, validate)


@pytest.mark.parametrize(
    "function", [sharded.arguments, sharded.numbers_of_numpy], ids=lambda function: function.__name__
)
def test_arguments(ranks: Ranks, function):
    ranks(3, function)


@pytest.mark.parametrize("asked", [False, True], ids=["first call", "later call"])
def test_a_rank_that_raises_leaves_nobody_hanging(ranks: Ranks, asked):
    found = ranks(SIZE, sharded.a_rank_that_raises, asked)
    assert f"ValueError: {'target_tokens' if asked else 'weights'} must" in found[1]
    for rank in (0, 2, 3):
        assert f"rank {rank} of a vocabulary's group" in found[rank], found[rank]
        assert "did not take part" in found[rank], found[rank]


# ---- A mesh, compiled, a head ----


@pytest.mark.parametrize("function", [sharded.of_a_mesh, sharded.of_fsdp], ids=lambda function: function.__name__)
def test_of_all_ranks(ranks: Ranks, function):
    ranks(SIZE, function)


def test_compiled(ranks: Ranks):
    ranks(2, sharded.compiled)


@pytest.mark.parametrize("name", sharded.HEADS)
def test_head(ranks: Ranks, name):
    for world in WORLDS:
        ranks(world, sharded.head, name, torch.float32, 6000)
    ranks(2, sharded.head, name, torch.float32, None)
    ranks(3, sharded.head, name, torch.bfloat16, 6000)


@pytest.mark.parametrize(
    "function", [sharded.head_without_tokens, sharded.global_tokens], ids=lambda function: function.__name__
)
def test_of_any_number_of_ranks(ranks: Ranks, function):
    for world in WORLDS:
        ranks(world, function)


@pytest.mark.parametrize("kind", ["data", "context"])
def test_gradients_over_ranks_are_those_of_the_whole_batch(ranks: Ranks, kind):
    for world in WORLDS:
        ranks(world, sharded.data_parallel, kind)
