"""The plugin of axolotl: what it refuses, and what it does to a model. tests/adapters/test_comparisons.py runs it by
axolotl's own manager."""

from __future__ import annotations

import functools
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from fused_losses.adapters import axolotl
from fused_losses.adapters import transformers as ours
from fused_losses.adapters.comparisons import transformers as runs

FINE = {"fused_losses": "head", "tensor_parallel_size": 1, "context_parallel_size": None, "cut_cross_entropy": False}


def loss_of(model):
    outputs = model(**runs.batch())
    outputs.loss.backward()
    return outputs


def test_what_is_fine():
    axolotl.check(FINE)
    axolotl.check({"fused_losses": "head", "fused_losses_chunk_bytes": 1 << 20})


@pytest.mark.parametrize("name", axolotl.CONFLICTS)
def test_options_that_are_in_the_way(name):
    with pytest.raises(ValueError, match=rf"^{name} is not supported together with fused_losses: "):
        axolotl.check({**FINE, name: True})


@pytest.mark.parametrize("name", ["context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"])
def test_what_is_split(name):
    with pytest.raises(ValueError, match=rf"^{name} above 1 is not supported together with fused_losses: "):
        axolotl.check({**FINE, name: 2})


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"adapter": "multilora"}, "^adapter: multilora is not supported"),
        ({"fused_losses": "all"}, """^fused_losses must be "head" or "loss", got 'all'$"""),
        ({"fused_losses": "loss", "fused_losses_chunk_bytes": 1}, "^fused_losses_chunk_bytes is of fused_losses: head"),
    ],
)
def test_what_else_is_refused(cfg, message):
    with pytest.raises(ValueError, match=message):
        axolotl.check(cfg)


def test_the_options_are_still_axolotls():
    """By the text of its wheel: one that has another name now would be in the way unseen."""
    spec = importlib.util.find_spec("axolotl")
    if spec is None:
        pytest.skip("axolotl is not installed: tests/oracles.txt")
    root = Path(next(iter(spec.submodule_search_locations)))
    texts = "\n".join(
        path.read_text() for part in ("utils/schemas", "integrations") for path in (root / part).rglob("*.py")
    )
    gone = [name for name in (*axolotl.CONFLICTS, *axolotl._SHARDED) if f"    {name}:" not in texts]
    assert not gone


def test_the_head():
    model, stock = runs.model_of("Llama"), runs.model_of("Llama")
    axolotl.put({"fused_losses": "head", "fused_losses_chunk_bytes": 1 << 16}, model)
    found, wanted = loss_of(model), loss_of(stock)
    assert found.logits is None and abs(found.loss - wanted.loss) < 1e-5
    ours.remove(model)


def test_the_loss():
    model = runs.model_of("Llama")
    axolotl.put({"fused_losses": "loss"}, model)
    assert isinstance(model.loss_function, functools.partial) and model.loss_function.func is ours.causal_lm_loss
    outputs = loss_of(model)
    assert outputs.logits is not None and abs(outputs.loss - loss_of(runs.model_of("Llama")).loss) < 1e-5


def test_a_model_in_peft_is_taken_out():
    model = runs.model_of("Llama")
    axolotl.put({"fused_losses": "head"}, types.SimpleNamespace(get_base_model=lambda: model))
    assert loss_of(model).logits is None


def test_its_options_extend_axolotls():
    pydantic = pytest.importorskip("pydantic")
    namespace: dict = {}
    exec("from fused_losses.adapters.axolotl import FusedLossesArgs", namespace)  # as axolotl writes it
    base = type("Base", (pydantic.BaseModel,), {})
    options = type("Options", (base, namespace["FusedLossesArgs"]), {})
    assert options().fused_losses == "head" and options(fused_losses_chunk_bytes=5).fused_losses_chunk_bytes == 5
    for wrong in ({"fused_losses": "all"}, {"fused_losses_chunk_bytes": 0}):
        with pytest.raises(pydantic.ValidationError, match=next(iter(wrong))):
            options(**wrong)


def test_the_plugin(monkeypatch):
    base = types.ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    axolotl._plugin.cache_clear()
    plugin = axolotl.FusedLossesPlugin()
    axolotl._plugin.cache_clear()
    assert isinstance(plugin, base.BasePlugin)
    module, _, name = plugin.get_input_args().rpartition(".")
    assert sys.modules[module] is axolotl and name == "FusedLossesArgs"
    with pytest.raises(ValueError, match=r"^rl is not supported"):
        plugin.pre_model_load({"rl": "grpo"})
    model = runs.model_of("Llama")
    plugin.pre_model_load(FINE)
    plugin.post_model_load(FINE, model)
    assert loss_of(model).logits is None


def test_no_other_name():
    with pytest.raises(AttributeError, match="has no attribute 'Plugin'"):
        _ = axolotl.Plugin


def test_it_imports_where_axolotl_is_not():
    code = "import sys; sys.modules['axolotl'] = None\nfrom fused_losses.adapters import axolotl; axolotl.check({})"
    subprocess.run([sys.executable, "-c", code], check=True)
