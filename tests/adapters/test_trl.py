"""The adapter for TRL: what is put in and back, what is refused, the edges. Their numbers: test_comparisons.py."""

from __future__ import annotations

import contextlib
import importlib
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from fused_losses.adapters import trl as adapter

utils = pytest.importorskip("trl.trainer.utils", reason="tests/oracles.txt")
kernels = importlib.import_module("trl.kernels.chunked_logprob")

N, H, V = 24, 16, 1009
IMPORTERS = (  # of selective_log_softmax or selective_log_softmax_and_entropy, by name
    "sdpo.sdpo_trainer",
    "sdpo.loss_utils",
    "a2po.a2po_trainer",
    "orpo.orpo_trainer",
    "sdft.sdft_trainer",
    "sdft.loss_utils",
    "cpo.cpo_trainer",
    "tpo.tpo_trainer",
)


@pytest.fixture
def installed():
    adapter.install()
    yield
    adapter.remove()


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, H, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(V, (N,), generator=generator)


def head(
    hidden,
    weight,
    targets,
    apply=None,
    *,
    temperature=1.0,
    chunk_size=512,
    softcap=None,
    scale=1.0,
    outputs=("log_probs",),
):
    apply = apply or adapter.ChunkedLogProb().apply
    return apply(hidden, weight, None, targets, temperature, chunk_size, softcap, scale, outputs)


# ---- In and back ----


def of_adapter(value):
    return isinstance(value, adapter.ChunkedLogProb) or getattr(value, "__module__", None) == adapter.__name__


def bound():
    """What modules of TRL have of the adapter's, by module and name."""
    modules = [(name, module) for name, module in sys.modules.items() if name.partition(".")[0] == "trl"]
    return {(name, key) for name, module in modules for key, value in vars(module).items() if of_adapter(value)}


def test_one_call_reaches_every_importer():
    importers = [importlib.import_module(f"trl.experimental.{name}") for name in IMPORTERS]
    before = [dict(vars(module)) for module in importers]
    assert bound() == set()
    adapter.install()
    try:
        reached = bound()
        assert reached >= {
            ("trl.kernels", "ChunkedLogProbFunction"),
            ("trl.kernels.chunked_logprob", "ChunkedLogProbFunction"),
            ("trl.trainer.utils", "_ChunkedLogProbFunction"),
            ("trl.trainer.utils", "selective_log_softmax"),
            ("trl.trainer.utils", "selective_log_softmax_and_entropy"),
        }
        assert {f"trl.experimental.{name}" for name in IMPORTERS} <= {module for module, _ in reached}
    finally:
        adapter.remove()
    assert bound() == set()
    assert [dict(vars(module)) for module in importers] == before


def test_a_module_imported_meanwhile_gets_theirs_back(monkeypatch):
    theirs = utils.selective_log_softmax
    adapter.install()
    try:
        late = ModuleType("trl.late")
        late.named = utils.selective_log_softmax
        monkeypatch.setitem(sys.modules, "trl.late", late)
        assert late.named is adapter.selective_log_softmax
    finally:
        adapter.remove()
    assert late.named is theirs


def test_install_and_remove_may_be_repeated():
    theirs = utils._ChunkedLogProbFunction
    adapter.remove()
    adapter.install()
    adapter.install(logits_dtype=torch.float32)
    assert utils._ChunkedLogProbFunction.logits_dtype is torch.float32
    adapter.remove()
    adapter.remove()
    assert utils._ChunkedLogProbFunction is theirs is kernels.ChunkedLogProbFunction


@pytest.mark.parametrize("name", ["selective_log_softmax", "selective_log_softmax_and_entropy"])
def test_a_function_that_moved_is_named_with_the_version(monkeypatch, name):
    monkeypatch.setattr(utils, name, lambda logits, ids: None)
    with pytest.raises(RuntimeError, match=rf"trl 1\.\d+\.\d+: trl.trainer.utils.{name} .*'ids'"):
        adapter.install()
    assert bound() == set()


def test_a_head_that_moved_is_named_with_the_version(monkeypatch):
    monkeypatch.setattr(kernels.ChunkedLogProbFunction, "forward", staticmethod(lambda ctx, hidden, weight: None))
    with pytest.raises(RuntimeError, match=r"trl 1\..*ChunkedLogProbFunction.forward .*chunk_size"):
        adapter.install()
    monkeypatch.undo()
    monkeypatch.delattr(utils, "_ChunkedLogProbFunction")
    with pytest.raises(RuntimeError, match=r"trl 1\..*trl.trainer.utils._ChunkedLogProbFunction .*not there"):
        adapter.install()
    assert bound() == set()


def test_what_somebody_else_put_in_stays(installed, monkeypatch):
    monkeypatch.setattr(utils, "selective_log_softmax", len)
    with pytest.raises(RuntimeError, match="was replaced after"):
        adapter.remove()


def test_trainers_run_on_it(monkeypatch):
    """Not on what they had before: each micro-batch's logprobs come from here."""
    comparisons = pytest.importorskip("fused_losses.adapters.comparisons.trl")
    calls = []
    apply = adapter.ChunkedLogProb.apply

    def counted(self, *arguments):
        calls.append(arguments[-1])
        return apply(self, *arguments)

    monkeypatch.setattr(adapter.ChunkedLogProb, "apply", counted)
    comparisons.sft()
    assert calls == []
    adapter.install()
    try:
        comparisons.sft()
    finally:
        adapter.remove()
    assert calls == [("log_probs", "entropy", "is_top1")] * 2


# ---- What is refused ----


def test_without_trl_its_functions_work_and_installing_says_what_is_missing():
    program = """
import sys
class Absent:
    def find_spec(name, path=None, target=None):
        if name == "trl":
            raise ModuleNotFoundError("No module named 'trl'", name="trl")
sys.meta_path.insert(0, Absent)
import torch
from fused_losses.adapters import trl
assert trl.selective_log_softmax(torch.zeros(1, 4), torch.tensor([2])).exp().item() == 0.25
trl.install()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'trl'", done.stderr


@pytest.mark.parametrize(
    ("message", "changed"),
    [
        ("outputs must be some of log_probs, .*, got 'entropies'", {"outputs": ("log_probs", "entropies")}),
        (r"16384 \* chunk_size must be greater than 0", {"chunk_size": 0}),
        ("temperature must be greater than 0 and finite, got 0", {"temperature": 0.0}),
        ("final_logit_softcapping must be greater than 0 and finite, got 0", {"softcap": 0.0}),
        ("logit_scale must be greater than 0 and finite, got 0", {"scale": 0.0}),
    ],
)
def test_the_head_refuses(message, changed):
    with pytest.raises(ValueError, match=message):
        head(*inputs(), **changed)


def test_the_head_refuses_a_quantised_weight_and_float64():
    hidden, weight, targets = inputs()
    with pytest.raises(TypeError, match=r"weight must .*int8"):
        head(hidden, weight.detach().to(torch.int8), targets)
    with pytest.raises(TypeError, match=r"must be float32, bfloat16 or float16, got torch.float64"):
        head(hidden.double(), weight.double(), targets)


@pytest.mark.parametrize("device", ["xpu", "mps", "meta"])
def test_other_devices_are_refused_by_name(device):
    with pytest.raises(ValueError, match=rf"hidden must be on a CPU or a CUDA device, got {device}"):
        adapter._check_device("hidden", torch.device(device))
    logits = torch.empty(2, V, device="meta")
    with pytest.raises(ValueError, match="logits must be on a CPU or a CUDA device, got meta"):
        adapter.selective_log_softmax(logits, torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("message", "index", "options"),
    [
        ("row_mask must have the shape of index", torch.zeros(2, 3, dtype=torch.int64), {"row_mask": torch.ones(2)}),
        ("temperature", torch.zeros(2, 3, dtype=torch.int64), {"temperature": 0.0}),
        ("index must .* got -100", torch.full((2, 3), -100), {}),
        ("index must .* got 1009", torch.full((2, 3), V), {}),
    ],
)
@pytest.mark.parametrize("function", [adapter.selective_log_softmax, adapter.selective_log_softmax_and_entropy])
def test_functions_refuse(function, message, index, options):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 3, V), index, **options)


def test_an_entropy_has_one_index_per_row():
    with pytest.raises(ValueError, match=r"index must have the shape of logits without .*\(2, 3\), got \(2, 3, 4\)"):
        adapter.selective_log_softmax_and_entropy(torch.zeros(2, 3, V), torch.zeros(2, 3, 4, dtype=torch.int64))


def test_install_refuses_other_dtypes_of_logits():
    with pytest.raises(TypeError, match=r"logits_dtype must be None or float32, got torch.float16"):
        adapter.install(logits_dtype=torch.float16)


# ---- Edges ----


def test_no_token_is_a_zero_connected_to_the_graph():
    hidden, weight, targets = inputs()
    given = head(hidden[:0], weight, targets[:0], outputs=tuple(adapter.OUTPUTS))
    assert [tuple(x.shape) for x in given] == [(0,)] * 5
    assert [x.dtype for x in given] == [torch.float32] * 4 + [torch.bool]
    given[0].sum().backward()
    assert not hidden.grad.any() and not weight.grad.any()


def test_a_token_without_upstream_gradient_sends_none_whatever_it_holds():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        hidden[3] = float("nan")
    seen = head(hidden, weight, targets)[0]
    assert seen.isnan().nonzero().tolist() == [[3]]
    seen.masked_fill(torch.arange(N) == 3, 0).sum().backward()
    assert not hidden.grad[3].any() and hidden.grad.isfinite().all() and weight.grad.isfinite().all()


def test_statistics_have_no_gradient_and_come_only_if_asked_for():
    hidden, weight, targets = inputs()
    given = head(hidden, weight, targets, outputs=tuple(adapter.OUTPUTS))
    assert [x.requires_grad for x in given] == [True, True, False, False, False]
    some = head(hidden, weight, targets, outputs=("mean_logits",))
    assert [x is None for x in some] == [False, True, True, False, True]
    torch.testing.assert_close(some[3], given[3])
    with torch.no_grad():
        assert not head(hidden, weight, targets)[0].requires_grad


def test_chunk_size_is_memory_and_not_numbers():
    """4096 tokens of chunk_size float32 logits: three whole rows at a time, or all of them."""
    given = []
    for chunk_size in (1, 32768):
        hidden, weight, targets = inputs()
        seen = head(hidden, weight, targets, chunk_size=chunk_size, outputs=("entropy",))
        (seen[0] + seen[1]).sum().backward()
        given.append((seen[0], seen[1], hidden.grad, weight.grad))
    torch.testing.assert_close(*given)

    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        head(hidden, weight, targets, chunk_size=1)
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert 3 * V * 4 <= max(sizes) <= 4096 * 4


def test_errors_in_bfloat16_beside_theirs():
    """Of logprobs, against float64 products of the same numbers: all but a float32 head's are of rounded logits."""
    hidden, weight, targets = (x.detach() for x in inputs(torch.bfloat16))
    exact = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    theirs, ours, wide = (
        (head(hidden, weight, targets, apply)[0] - exact).abs().max().item()
        for apply in (
            utils._ChunkedLogProbFunction.apply,
            adapter.ChunkedLogProb().apply,
            adapter.ChunkedLogProb(torch.float32).apply,
        )
    )
    assert ours <= 1.1 * theirs
    assert wide < 1e-5 < 1e-3 < theirs


def test_a_weight_that_zero_3_shards_is_gathered_for_backward(monkeypatch):
    """With a stand-in for DeepSpeed: the weight is empty outside of TRL's context."""
    hidden, weight, targets = inputs()
    plain = head(hidden, weight, targets, outputs=("entropy",))
    wanted = torch.autograd.grad((plain[0] + plain[1]).sum(), (hidden, weight))

    whole, gathered = weight.detach().clone(), []
    sharded = torch.nn.Parameter(torch.empty(0))
    sharded.ds_status = "NOT_AVAILABLE"

    @contextlib.contextmanager
    def gather(*parameters):
        gathered.append(parameters)
        sharded.data = whole
        yield
        sharded.data = torch.empty(0)

    monkeypatch.setattr(utils, "maybe_gather_lm_head_ctx", gather)
    with gather(sharded):
        seen = head(hidden, sharded, targets, outputs=("entropy",))
    assert sharded.numel() == 0
    torch.testing.assert_close(torch.autograd.grad((seen[0] + seen[1]).sum(), (hidden, sharded)), wanted)
    assert len(gathered) == 2 and sharded.numel() == 0


def gradients_of_a_sharded_model(rank):
    """Of FSDP2, whole: with TRL's head, and with ours."""
    comparisons = importlib.import_module("fused_losses.adapters.comparisons.trl")
    mesh = DeviceMesh.from_group(rank.group, "cpu")
    seen = []
    for prepare in (adapter.remove, adapter.install):
        prepare()
        model = comparisons.model()
        fully_shard(model, mesh=mesh)
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        tokens = torch.randint(3, 19, (2, 9), generator=torch.Generator().manual_seed(rank.rank))
        labels = tokens.masked_fill(torch.arange(9) < 3, -100)
        given = model(input_ids=tokens, labels=labels, fused_lm_head=True)
        (given.loss - 0.1 * given.entropy.sum()).backward()
        seen.append([parameter.grad.full_tensor() for parameter in model.parameters()])
    adapter.remove()
    return seen


@pytest.mark.xdist_group("ranks")
def test_fsdp2(ranks):
    pytest.importorskip("datasets", reason="tests/oracles.txt")
    theirs, ours = ranks(2, gradients_of_a_sharded_model)[0]
    assert len(theirs) == 21
    torch.testing.assert_close(ours, theirs)


def test_the_head_compiles_into_one_graph():
    hidden, weight, targets = inputs()

    def loss(hidden, weight):
        seen = head(hidden, weight, targets, outputs=("entropy", "is_top1"))
        return -(seen[0] + 0.1 * seen[1]).sum()

    wanted = torch.autograd.grad(loss(hidden, weight), (hidden, weight))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_functions_of_16_bit_logits_give_float32(dtype):
    logits = (4 * torch.randn(2, 5, V, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_()
    index = torch.arange(8).view(2, 4)
    shifted = logits[:, :-1]  # a view, as trainers hand it over
    logprobs, entropy = adapter.selective_log_softmax_and_entropy(shifted, index, entropy_requires_grad=False)
    exact = shifted.double().log_softmax(-1)
    assert logprobs.dtype is entropy.dtype is torch.float32
    torch.testing.assert_close(logprobs.double(), exact.gather(-1, index[..., None])[..., 0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=1e-6, atol=1e-6)
    assert logprobs.requires_grad and not entropy.requires_grad
    several = adapter.selective_log_softmax(shifted, index[..., None].expand(2, 4, 3))
    assert several.dtype is torch.float32
    torch.testing.assert_close(several, logprobs[..., None].expand(2, 4, 3))
    logprobs.sum().backward()
    assert logits.grad.dtype is dtype and not logits.grad[:, -1].any()


def test_rows_that_are_masked_are_not_read():
    logits = torch.randn(2, 3, V, generator=torch.Generator().manual_seed(0))
    logits[0, 1] = float("nan")
    logits.requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]])
    index = torch.zeros(2, 3, dtype=torch.int64)
    logprobs, entropy = adapter.selective_log_softmax_and_entropy(logits, index, row_mask=mask)
    assert logprobs[0, 1] == entropy[0, 1] == 0
    (logprobs + entropy).sum().backward()
    assert not logits.grad[0, 1].any() and logits.grad.isfinite().all()
    logits.grad = None
    several = adapter.selective_log_softmax(
        logits, index[..., None].expand(2, 3, 2), row_mask=mask[..., None].expand(2, 3, 2)
    )
    assert not several[0, 1].any()
    several.sum().backward()
    assert not logits.grad[0, 1].any() and logits.grad.isfinite().all() and logits.grad[0, 0].any()
