"""One table of keywords, and what is made of it: the losses, their reference, their docstrings, the tables in docs/."""

from __future__ import annotations

import ast
import inspect
import math
import re
from pathlib import Path

import pytest

import fused_losses
from fused_losses import keywords, problem, reference
from fused_losses.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
each = pytest.mark.parametrize("name", keywords.LOSSES)


@each
def test_signature(name):
    """Of the loss and of its reference, annotations included; and that of the docstring."""
    assert inspect.signature(getattr(fused_losses, name)) == keywords.signature(name)
    assert inspect.signature(getattr(reference, name)) == keywords.signature(name)
    assert inspect.getdoc(getattr(fused_losses, name)) == keywords.docstring(name)


def test_every_loss_is_in_the_table():
    ours = {name for name in fused_losses.__all__ if "return_outputs" in _parameters(getattr(fused_losses, name))}
    assert ours | {"logprobs", "statistics"} == set(keywords.LOSSES)
    assert set(OBJECTIVES) <= set(keywords.LOSSES) and set(keywords.LOSSES) <= set(fused_losses.__all__)


def _parameters(thing: object) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(thing).parameters) if inspect.isfunction(thing) else {}


@each
def test_docstring(name):
    """An entry for each keyword, in the order of the signature, in lines that fit."""
    text = keywords.docstring(name)
    arguments = text[text.index("Args:") : text.index("Returns:")]
    entries = re.findall(r"^ {4}(\w+(?:, \w+)*): ", arguments, re.MULTILINE)
    assert [entry for line in entries for entry in line.split(", ")] == [n for n in _order(name) if n != "inputs"]
    assert "Raises:" in text and all(len(line) <= 116 for line in text.splitlines())


def _order(name: str) -> list[str]:
    return list(keywords.signature(name).parameters)


@each
def test_columns_of_the_objective(name):
    """They are the loss's keywords of the group "inputs" and the clamp; only what may be left out is None."""
    if name in OBJECTIVES:
        columns = {n for n in _order(name) if n == "log_ratio_clamp" or keywords.KEYWORDS[n].group == "inputs"}
        assert columns == set(OBJECTIVES[name].columns)
        given = keywords.defaults(name)
        assert {n for n in columns if n in given and given[n] is None} == set(OBJECTIVES[name].limits)


@pytest.mark.parametrize("group", ["Sequences", "PolicyTerms", "Transform", "Reduction", "How"])
def test_records(group):
    """A record of problem.py has the fields of its group, in that order, and the keywords' defaults."""
    record = getattr(problem, group)
    ours = {k.name: k.default for k in keywords.KEYWORDS.values() if k.group == group}
    assert list(record._fields) == list(ours) and record._field_defaults == ours


def test_bounds_hold_for_defaults():
    for name in keywords.LOSSES:
        for keyword, default in keywords.defaults(name).items():
            if keyword in keywords.LEAST and default is not None:
                least, reached = keywords.LEAST[keyword]
                assert default > least or (reached and default == least)
            if keyword in keywords.MOST:
                assert default <= keywords.MOST[keyword]
    for keyword, neutral in keywords.NEUTRAL.items():  # a masked token's must pass the bounds, too
        least, reached = keywords.LEAST.get(keyword, (-math.inf, False))
        assert neutral > least or (reached and neutral == least)


def test_losses_are_as_written(monkeypatch, capsys, tmp_path):
    """The file that is there is the one that the tool writes; --check sees one digit that is not, and says the cure."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    import write_losses as tool

    monkeypatch.setattr("sys.argv", ["write_losses.py", "--check"])
    assert tool.main() == 0
    changed = (ROOT / "fused_losses" / "losses.py").read_text().replace("0.8", "0.9", 1)
    (tmp_path / "losses.py").write_text(changed)
    monkeypatch.setattr(tool, "PACKAGE", tmp_path)
    assert tool.main() == 1 and "python tools/write_losses.py" in capsys.readouterr().err
    assert (tmp_path / "losses.py").read_text() == changed
    monkeypatch.setattr("sys.argv", ["write_losses.py"])
    assert tool.main() == 0
    assert (tmp_path / "losses.py").read_text() == (ROOT / "fused_losses" / "losses.py").read_text()


# ---- The tables of docs/ ----


def _rows(page: str, header: str) -> list[list[str]]:
    """The rows of the table whose header begins so."""
    lines = (ROOT / page).read_text().splitlines()
    (first,) = (n for n, line in enumerate(lines) if line.startswith(header))
    rows = []
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def _value(text: str) -> object:
    """None, False, "k3", 1.0 or e^0.4; what follows a colon says what it means."""
    text = text.split(":")[0].strip()
    return math.exp(float(text[2:])) if text.startswith("e^") else ast.literal_eval(text)


POLICY = tuple(name for name, objective in OBJECTIVES.items() if "advantages" in objective.inputs)


@pytest.mark.parametrize(
    "page, header, losses",
    [
        ("docs/cross_entropy.md", "| argument | default", ("cross_entropy",)),
        ("docs/policy.md", "| argument of all | default", POLICY),
        ("docs/sequence.md", "| argument | default", ("sapo", "gspo", "gmpo", "vespo")),
    ],
)
def test_defaults_in_docs(page, header, losses):
    """Those that a table states; a third cell may say of which losses. Each keyword of all the losses is in it."""
    names: list[str] = []
    stated: set[str] = set()
    for first, default, words in _rows(page, header):
        names = re.findall(r"`(\w+)`", first) or names
        stated |= set(names)
        if default:
            said = default.split(", ")
            assert len(said) in (1, len(names)), default
            for name, text in zip(names, said * len(names) if len(said) == 1 else said, strict=True):
                of = [loss for loss in losses if re.search(rf"\b{loss}\b", words.split(";")[0])]
                of = of or [loss for loss in losses if name in _order(loss)]
                assert of
                for loss in of:
                    wanted, got = keywords.defaults(loss)[name], _value(text)
                    assert wanted == (pytest.approx(got) if isinstance(got, float) else got), (loss, name)
    of_all = set.intersection(*(set(_order(loss)) for loss in losses))
    if page != "docs/sequence.md":  # which leaves to policy.md what is there
        assert {name for loss in losses for name in keywords.defaults(loss) if name in of_all} <= stated


@pytest.mark.parametrize(
    "page, header, count",
    [("docs/losses.md", "| function | per token", 5), ("docs/policy.md", "| function | obj", len(POLICY))],
)
def test_reductions_and_bounds_in_docs(page, header, count):
    seen = set()
    for first, _, *cells in _rows(page, header):
        name = re.fullmatch(r"`(\w+)(\(.*\))?`", first)
        if name is None or name[1] in ("logprobs", "statistics"):
            continue
        loss, text = name[1], " ".join(cells)
        given = keywords.defaults(loss)
        bounds = [given[n] for n in given if keywords.KEYWORDS[n].group == "inputs" and given[n] is not None]
        assert [float(number) for number in re.findall(r"\d+\.\d+", re.sub(r"http\S+", "", text))] == bounds
        assert given["reduction"] in re.findall(r"\b(mean|sum)\b", text)
        seen.add(loss)
    assert len(seen) == count
