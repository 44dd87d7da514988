"""Write fused_losses/losses.py and on_logprobs.py from fused_losses/keywords.py.

    python tools/write_losses.py            writes them
    python tools/write_losses.py --check    fails if they are not what would be written

Signatures and docstrings are whole in the written file, so that editors and type checkers, which run nothing, see them.
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "fused_losses"
sys.path.insert(0, str(PACKAGE))  # not the package: its losses.py may be missing or broken

from keywords import KEYWORDS, LOSSES, ON_LOGPROBS, Loss, docstring, signature  # noqa: E402

COMMAND = "python tools/write_losses.py"
WRITTEN = f"# Written by tools/write_losses.py from fused_losses/keywords.py. Change that, then run: {COMMAND}"
HEAD = f'''{WRITTEN}
"""The public losses.

Each is three stages: statistics of the vocabulary per token, a small objective per token, the gradient of the logits
from both. Only the objective differs, so each function below only names it, and groups its arguments into the records
of problem.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

from torch import Tensor

from . import call
from .linear_head import LinearHead
from .objectives import Objective
from .outputs import Outputs, Statistics
from .problem import (
    BackendName,
    How,
    KlType,
    PolicyTerms,
    RatioGradient,
    Reduction,
    ReductionName,
    Sequences,
    StatisticName,
    Transform,
)
from .vocab_shard import VocabShard
'''
HEAD_ON_LOGPROBS = f'''{WRITTEN}
"""The losses for callers that have logprobs already, as the loss functions that trainers register do.

    from fused_losses import on_logprobs

    loss = on_logprobs.ppo(logprobs, old_logprobs, advantages, weights=mask)

The same objectives, keywords, defaults and metrics as those of the losses on logits, less what is about logits. They
are differentiable through ``logprobs`` and ``entropy``, and composed of torch operations on one number per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from . import from_logprobs
from .objectives import Objective
from .outputs import Outputs
from .problem import How, KlType, PolicyTerms, RatioGradient, Reduction, ReductionName, Sequences
'''
GROUPS = ("Sequences", "PolicyTerms", "Transform", "Reduction", "How")  # records of problem.py, in the order of a call
BY_NAME = ("policy", "sequence_policy", "of_logprob")  # functions of call.py that serve several losses
OF_ROWS = ("ignore_index", "inplace", "backend")
WIDTH = 120


def function(loss: Loss, table: Mapping[str, Loss] = LOSSES, module: str = "call") -> str:
    """Overloads for a flag that is False, True or not known, on which it depends whether the result is a pair; body."""
    pair = f"tuple[Tensor, {loss.second}]"
    documented = textwrap.indent(f'"""{docstring(loss.name, table)}\n"""', "    ")
    called = block(f"{module}.{loss.call}(", arguments(loss), ")", 4)
    if not loss.flag:
        return f"""{head(loss, table, "")} -> {loss.second}:
{documented}
    return {called}
"""
    return f"""@overload
{head(loss, table, "Literal[False]", default=True)} -> Tensor: ...
@overload
{head(loss, table, "Literal[True]")} -> {pair}: ...
@overload
{head(loss, table, "bool")} -> Tensor | {pair}: ...
{head(loss, table, "bool", default=True)} -> Tensor | {pair}:
{documented}
    return {called}
"""


def head(loss: Loss, table: Mapping[str, Loss], flag: str, default: bool = False) -> str:
    """``def name(...)``, the flag being of that type and, unless ``default``, to be given."""
    parameters = [
        p if p.name != loss.flag else p.replace(annotation=flag, default=p.default if default else p.empty)
        for p in signature(loss.name, table).parameters.values()
    ]
    kinds = [p.kind for p in parameters]
    lines = [parameter(p) for p in parameters]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        lines.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    return "\n".join((f"def {loss.name}(", *(f"    {line}," for line in lines), ")"))


def parameter(p: inspect.Parameter) -> str:
    star = "*" if p.kind is p.VAR_POSITIONAL else ""
    default = "" if p.default is p.empty else f" = {literal(p.default)}"
    annotation = p.annotation.replace("'", '"')
    return f"{star}{p.name}: {annotation}{default}"


def literal(value: object) -> str:
    return repr(value).replace("'", '"')


def arguments(loss: Loss) -> list[str]:
    """Of the call in the body."""
    # of no loss: they have no more of Reduction and How than these three
    if loss.call == "logprobs":
        return ["logits", "target_tokens", record("Transform", loss), *OF_ROWS, "return_entropy"]
    if loss.call == "statistics":
        return ["logits", "target_tokens", "outputs", record("Transform", loss), *OF_ROWS]
    given = [f'"{loss.name}"'] if loss.call in BY_NAME else []
    inputs = [f'"{name}": {name}' for name in members("inputs", loss)]
    for name in loss.keywords:
        if KEYWORDS[name].group == "":
            given.append(name)
        elif inputs and name == members("inputs", loss)[0]:
            given.append(block("{", inputs, "}", 8))
    return given + [record(group, loss) for group in GROUPS if members(group, loss)]


def members(group: str, loss: Loss) -> list[str]:
    return [name for name in loss.keywords if KEYWORDS[name].group == group]


def record(group: str, loss: Loss) -> str:
    return block(f"{group}(", [f"{name}={name}" for name in members(group, loss)], ")", 8)


def block(opening: str, items: list[str], closing: str, indent: int) -> str:
    """In one line if it fits; laid out as ruff does."""
    line = f"{opening}{', '.join(items)}{closing}"
    if "\n" not in line and indent + len(line) < WIDTH:
        return line
    return "".join((f"{opening}\n", *(f"{' ' * (indent + 4)}{item},\n" for item in items), " " * indent, closing))


def main() -> int:
    on_logprobs = [function(loss, ON_LOGPROBS, "from_logprobs") for loss in ON_LOGPROBS.values()]
    written = {
        "losses.py": (HEAD, *map(function, LOSSES.values())),
        "on_logprobs.py": (HEAD_ON_LOGPROBS, *on_logprobs),
    }
    wrong = 0
    for name, parts in written.items():
        path, text = PACKAGE / name, "\n\n".join(parts)
        if "--check" not in sys.argv:
            path.write_text(text)
        elif not path.exists() or path.read_text() != text:
            print(f"{path} is not what fused_losses/keywords.py says. Run: {COMMAND}", file=sys.stderr)
            wrong = 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
