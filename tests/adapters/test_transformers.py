"""The adapter of transformers: its loss, its head in their models, and their Trainer with both."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
from transformers.loss.loss_utils import ForCausalLMLoss  # noqa: E402

from fused_losses import LinearHead  # noqa: E402
from fused_losses.adapters import comparison  # noqa: E402
from fused_losses.adapters import transformers as ours  # noqa: E402
from fused_losses.adapters.comparisons import transformers as runs  # noqa: E402

V = runs.VOCAB


def gradients(model, labels=True, **options):
    """The outputs of a training step, and the gradient of each parameter."""
    model.zero_grad()
    batch = runs.batch()
    outputs = model(**(batch if labels else {"input_ids": batch["input_ids"]}), **options)
    outputs["loss"].backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, wanted, tolerance=1e-5):
    (outputs, grads), (wanted_outputs, wanted_grads) = found, wanted
    assert comparison.difference(wanted_outputs["loss"], outputs["loss"]) <= 1e-6
    assert grads.keys() == wanted_grads.keys()
    worst = {name: comparison.difference(wanted_grads[name], grads[name]) for name in grads}
    assert max(worst.values()) <= tolerance, worst


@pytest.fixture
def llama():
    return runs.model_of("Llama")


# ---- The loss ----


def test_its_signature_is_theirs():
    theirs, here = (inspect.signature(f).parameters for f in (ForCausalLMLoss, ours.causal_lm_loss))
    assert list(theirs) == [name for name in here if name != "upstream"]
    for name, parameter in theirs.items():
        assert (parameter.default, parameter.kind) == (here[name].default, here[name].kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [None, 7, 7.5, torch.tensor(7), torch.tensor([7])])
@pytest.mark.parametrize("ignore_index", [-100, 5])
def test_numbers_of_the_loss(dtype, count, ignore_index):
    torch.manual_seed(0)
    logits = (3 * torch.randn(3, 7, 31)).to(dtype).requires_grad_()
    labels = torch.randint(31, (3, 7))
    labels[0, :3] = ignore_index
    found = []
    for function in (ForCausalLMLoss, ours.causal_lm_loss):
        logits.grad = None
        loss = function(logits, labels, 31, count, ignore_index, use_cache=False).sum()
        loss.backward()
        found.append((loss.detach(), logits.grad))
    torch.testing.assert_close(found[1][0], found[0][0])
    torch.testing.assert_close(found[1][1], found[0][1])
    assert found[1][1][:, -1].abs().max() == 0  # nobody knows what the last token predicts


def test_labels_that_are_shifted():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 31), torch.randint(31, (2, 5))
    for shape in ((2, 5), (10,)):
        given = {"labels": None, "vocab_size": 31, "shift_labels": labels.view(shape)}
        torch.testing.assert_close(ours.causal_lm_loss(logits, **given), ForCausalLMLoss(logits, **given))


def test_no_label_at_all_is_no_loss():
    logits = torch.randn(2, 5, 31, requires_grad=True)
    loss = ours.causal_lm_loss(logits, torch.full((2, 5), -100), 31)
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() == 0


def test_the_logits_stay_as_they_are():
    logits = torch.randn(2, 5, 31, requires_grad=True)
    kept, before = logits * 1, logits.detach().clone()
    ours.causal_lm_loss(kept, torch.randint(31, (2, 5)), 31).backward()
    assert torch.equal(kept, before)


@pytest.mark.parametrize("option", ["weight", "label_smoothing", "reduction", "size_average", "reduce"])
def test_options_that_transformers_ignores_are_refused(option):
    with pytest.raises(TypeError, match=f"^{option} is not taken by causal_lm_loss"):
        ours.causal_lm_loss(torch.randn(2, 5, 31), torch.zeros(2, 5, dtype=torch.long), 31, **{option: 0.1})


def test_what_does_not_fit():
    logits, labels = torch.randn(2, 5, 31), torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(ValueError, match="vocab_size must be that of logits, 31, got 30"):
        ours.causal_lm_loss(logits, labels, 30)
    with pytest.raises(ValueError, match=r"labels must be as many as tokens, \(2, 5\), got \(2, 4\)"):
        ours.causal_lm_loss(logits, labels[:, 1:], 31)
    with pytest.raises(TypeError, match="labels must be a tensor where shift_labels are not given"):
        ours.causal_lm_loss(logits, None, 31)
    with pytest.raises(ValueError, match=r"num_items_in_batch must be one number, got a tensor of shape \(2,\)"):
        ours.causal_lm_loss(logits, labels, 31, torch.tensor([1, 2]))


def test_upstream_changes_no_number():
    logits, labels = torch.randn(2, 5, 31, requires_grad=True), torch.randint(31, (2, 5))
    grads = []
    for upstream in (1.0, 8.0, torch.tensor(3.0)):
        loss = functools.partial(ours.causal_lm_loss, upstream=upstream)(logits, labels, 31)
        loss *= 8  # as Trainer does, in place
        grads += torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def test_compute_loss_func():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 31), torch.randint(31, (2, 5))
    wanted = ForCausalLMLoss(logits, labels, 31, 9)
    for outputs in (transformers.modeling_outputs.CausalLMOutput(logits=logits), {"logits": logits}, (logits, None)):
        torch.testing.assert_close(ours.compute_loss_func(outputs, labels, num_items_in_batch=9), wanted)
    outputs = {"logits": logits, "aux_loss": torch.tensor(1.0)}
    with pytest.raises(ValueError, match="aux_loss, a router's loss, is not part of compute_loss_func"):
        ours.compute_loss_func(outputs, labels)


# ---- The head ----


@pytest.mark.parametrize("name", runs.MODELS)
def test_install_and_remove(name):
    model = runs.model_of(name)
    batch = runs.batch()
    wanted = gradients(model)
    attributes, signature = set(vars(model)), inspect.signature(model.forward)
    ours.install(model)
    assert inspect.signature(model.forward) == signature  # Trainer looks at it
    assert_same(found := gradients(model), wanted)
    assert found[0].logits is None and "logits" not in found[0]
    assert [key for key in wanted[0] if key != "logits"] == list(found[0])
    with torch.no_grad():
        assert model(input_ids=batch["input_ids"]).logits.shape == (2, 24, V)  # no labels: its own forward
        assert model.eval()(**batch).logits.shape == (2, 24, V)
    ours.remove(model.train())
    assert set(vars(model)) == attributes
    assert gradients(model)[0].logits is not None


MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Gemma4", {"final_logit_softcapping": 3.0, "vocab_size_per_layer_input": V, "hidden_size_per_layer_input": 8}),
        ("NanoChat", {"final_logit_softcapping": 3.0}),
        ("FalconH1", {"lm_head_multiplier": 0.3, **MAMBA}),  # a scale that the base model has
        ("HyperCLOVAX", {"logits_scaling": 0.3}),  # multiplied, not divided
        ("GptOss", runs.EXPERTS),
        ("Olmoe", runs.EXPERTS),
        ("Mamba", {}),  # a cast of hidden states, return_dict by hand
        ("Bloom", {"n_layer": 2, "n_head": 4}),
        *((name, {}) for name in ("GPTNeoX", "Olmo2", "Glm4", "SmolLM3", "StableLm", "Starcoder2", "Nemotron")),
    ],
)
def test_other_models(name, options):
    model = runs.model_of(name, **options)
    wanted = gradients(model)
    ours.install(model)
    assert_same(gradients(model), wanted)


def test_nothing_of_tokens_times_classes_is_made(llama, monkeypatch):
    ours.install(llama, chunk_bytes=4 * V * 8)
    seen = []
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.append(linear(*a)) or seen[-1])
    gradients(llama)
    assert seen and all(made.shape[-1] != V for made in seen)


def test_calls_of_all_kinds(llama):
    batch = runs.batch()
    wanted = gradients(llama, num_items_in_batch=torch.tensor(50))
    ours.install(llama)
    assert_same(gradients(llama, num_items_in_batch=50), wanted)
    as_tuple = llama(**batch, return_dict=False, num_items_in_batch=50)
    assert isinstance(as_tuple, tuple)
    torch.testing.assert_close(as_tuple[0], wanted[0].loss)
    assert all(not isinstance(value, ours.PendingLogits) for value in as_tuple)
    positional = llama(batch["input_ids"], None, None, None, None, batch["labels"], num_items_in_batch=50)
    torch.testing.assert_close(positional.loss, wanted[0].loss)
    with torch.no_grad():  # where nobody wants a gradient there are no logits either
        outputs = llama(**batch, num_items_in_batch=50, output_hidden_states=True)
    torch.testing.assert_close(outputs.loss, wanted[0].loss)
    assert outputs.logits is None and len(outputs.hidden_states) == 3


def test_logits_to_keep_and_shifted_labels(llama):
    batch = runs.batch()
    kept = {**batch, "shift_labels": batch["labels"][:, -6:].contiguous(), "logits_to_keep": 6}
    wanted = llama(**kept).loss
    ours.install(llama)
    torch.testing.assert_close(llama(**kept).loss, wanted)
    with pytest.raises(ValueError, match=r"labels must be as many as tokens, \(2, 6\), got \(2, 24\)"):
        llama(**batch, logits_to_keep=6)
    assert "lm_head" not in vars(llama) and isinstance(llama.lm_head, nn.Linear)  # an error leaves nothing behind


def test_evaluation_if_wanted(llama):
    wanted = llama.eval()(**runs.batch()).loss
    ours.install(llama, evaluation=True)
    outputs = llama(**runs.batch())
    torch.testing.assert_close(outputs.loss, wanted)
    assert outputs.logits is None and llama(runs.batch()["input_ids"]).logits is not None


def test_generation(llama):
    ids = runs.batch()["input_ids"][:, :4]
    options = {"max_new_tokens": 4, "do_sample": False}
    wanted = llama.eval().generate(ids, **options)
    ours.install(llama)
    assert torch.equal(llama.generate(ids, **options), wanted)


def test_gradient_checkpointing_and_accumulation(llama):
    wanted = gradients(llama)
    ours.install(llama)
    llama.gradient_checkpointing_enable()
    assert_same(gradients(llama), wanted)
    twice = llama(**runs.batch()).loss
    twice.backward()
    for name, p in llama.named_parameters():
        assert comparison.difference(2 * wanted[1][name], p.grad) <= 1e-5, name


def test_autocast():
    found = []
    for put in (runs.nothing, ours.install):
        model = runs.model_of("Llama")
        put(model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model))
    assert_same(found[1], found[0], 2**-8)  # products are of 16 bits on both sides


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Granite"])
def test_sixteen_bits_are_as_near_the_truth_as_theirs(name):
    stock, fused = runs.model_of(name, torch.bfloat16), runs.model_of(name, torch.bfloat16)
    ours.install(fused)
    truth = runs.model_of(name)
    truth.load_state_dict(stock.state_dict())
    grads = [torch.cat([g.flatten().double() for g in gradients(m)[1].values()]) for m in (truth, stock, fused)]
    theirs, here = ((g - grads[0]).norm() for g in grads[1:])
    assert here <= 1.1 * theirs  # most of both is what the layers below have rounded


def test_compiled(llama):
    wanted = gradients(llama)
    ours.install(llama)
    compiled = torch.compile(llama, backend="eager", fullgraph=True)
    outputs, found = gradients(compiled)
    assert_same((outputs, {name.replace("_orig_mod.", ""): g for name, g in found.items()}), wanted)


def test_a_frozen_head_and_a_frozen_body(llama):
    for frozen in (llama.lm_head, llama.model):
        model = copy.deepcopy(llama)
        for p in (model.lm_head if frozen is llama.lm_head else model.model.layers).parameters():
            p.requires_grad_(False)
        wanted = gradients(model)
        ours.install(model)
        assert_same(gradients(model), wanted)


def test_copies_and_what_is_saved(llama):
    wanted = gradients(llama)
    ours.install(llama)
    copied = copy.deepcopy(llama)
    assert copied.forward.__self__ is copied
    ours.remove(llama)
    assert_same(gradients(copied), wanted)
    assert gradients(copied)[0].logits is None
    assert copied.state_dict().keys() == llama.state_dict().keys()
    torch.save(copied, kept := io.BytesIO())
    kept.seek(0)
    loaded = torch.load(kept, weights_only=False)
    ours.install(loaded)
    assert_same(gradients(loaded), wanted)


def test_a_second_backward_says_what_the_models_caller_can_do(llama):
    ours.install(llama)
    loss = llama(**runs.batch()).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward .* call the loss anew, or the model or trainer that"):
        loss.backward()
    llama(**runs.batch()).loss.backward()


def test_two_threads_train_with_one_model(llama):
    """The first is done while the second is in its forward; were they there together, each would undo the other's."""
    ours.install(llama)
    batch, wanted = runs.batch(), llama(**runs.batch()).loss.item()
    second_is_in, first_is_done = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread().name == "first":
            second_is_in.wait(0.3)
        else:
            second_is_in.set()
            first_is_done.wait(0.3)

    llama.model.register_forward_pre_hook(wait)

    def first():
        try:
            return llama(**batch)
        finally:
            first_is_done.set()

    one, other = in_threads(first=first, second=lambda: llama(**batch))
    assert one.loss.item() == other.loss.item() == wanted
    assert one.logits is other.logits is None
    assert "lm_head" not in vars(llama)


@pytest.mark.parametrize("labels", [False, True])
def test_a_thread_that_evaluates_has_the_models_own_logits(llama, labels):
    batch = runs.batch()
    given = batch if labels else {"input_ids": batch["input_ids"]}
    wanted = llama(**given)
    ours.install(llama)
    trains, evaluated = threading.Event(), threading.Event()

    def wait(module, args):
        if threading.current_thread().name == "first":
            llama.training = False  # in the trunk already: what else asks is the other thread
            trains.set()
            evaluated.wait(10)

    llama.model.register_forward_pre_hook(wait)

    def evaluate():
        trains.wait(10)
        try:
            return llama(**given)
        finally:
            evaluated.set()

    _, seen = in_threads(first=lambda: llama(**batch), second=evaluate)
    assert torch.equal(seen.logits, wanted.logits)
    if labels:
        assert comparison.difference(wanted.loss, seen.loss) <= 1e-6


def in_threads(**functions):
    """What they return, each run in a thread of its name."""
    with ExitStack() as stack:
        running = []
        for name, function in functions.items():
            pool = stack.enter_context(ThreadPoolExecutor(1, initializer=rename_thread, initargs=(name,)))
            running.append(pool.submit(function))
        return [each.result(30) for each in running]


def rename_thread(name):
    threading.current_thread().name = name


def test_a_second_call_changes_the_options(llama):
    ours.install(llama)
    ours.install(llama, evaluation=True)
    assert llama.eval()(**runs.batch()).logits is None
    ours.remove(llama)
    ours.remove(llama)
    assert llama(**runs.batch()).logits is not None


def test_the_loss_function_of_the_model_is_asked(llama):
    ours.install(llama)
    llama.loss_function = functools.partial(ours.causal_lm_loss, upstream=2.0)
    assert gradients(llama)[0].logits is None
    assert llama.loss_function.func is ours.causal_lm_loss
    llama.loss_function = lambda **_: 0.0
    with pytest.raises(ValueError, match=r"^LlamaForCausalLM.loss_function must be transformers' ForCausalLMLoss or"):
        llama(**runs.batch())


# ---- What is refused ----


class Wrapped(nn.Module):
    """As PEFT wraps a head."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer


def changed(**attributes):
    def change(model):
        for name, value in attributes.items():
            setattr(model, name, value)

    return change


def of_heads(change):
    return lambda model: change(model.lm_head)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: changed(lm_head=Wrapped(m.lm_head))(m), TypeError, r"LlamaForCausalLM.lm_head can't .* merge it"),
        (lambda m: changed(lm_head=type("Linear4bit", (nn.Linear,), {})(32, V))(m), TypeError, "got Linear4bit"),
        (of_heads(lambda h: h.register_forward_hook(lambda *_: None)), ValueError, "lm_head can't be fused: .* hooks"),
        (of_heads(lambda h: setattr(h.weight, "ds_id", 0)), TypeError, "lm_head can't be fused: .* ZeRO-3"),
        (changed(loss_function=lambda **_: 0), ValueError, "LlamaForCausalLM.loss_function must be .* got .*lambda"),
        (changed(forward=lambda **_: 0), ValueError, "LlamaForCausalLM: the forward of this model is somebody else's"),
        (changed(get_base_model=None), TypeError, r"got LlamaForCausalLM: give model.get_base_model\(\)"),
        (changed(get_output_embeddings=lambda: nn.Linear(1, 1)), ValueError, "LlamaForCausalLM has no output embed"),
    ],
    ids=["lora", "quantised", "hook", "zero3", "loss function", "forward", "peft", "no head"],
)
def test_models_that_are_refused(llama, change, error, message):
    change(llama)
    attributes = set(vars(llama))
    with pytest.raises(error, match=message):
        ours.install(llama)
    assert set(vars(llama)) == attributes


@pytest.fixture
def mesh():
    """Of this process alone."""
    from torch.distributed.tensor import init_device_mesh

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_head_that_is_sharded(llama, mesh):
    from torch.distributed.tensor import DTensor, Shard

    llama.lm_head.weight = nn.Parameter(DTensor.from_local(llama.lm_head.weight.data, mesh, [Shard(0)]))
    with pytest.raises(TypeError, match=r"LlamaForCausalLM.lm_head can't be fused: .*DTensor"):
        ours.install(llama)


@pytest.mark.parametrize("of", ["ddp", "fsdp"])
def test_data_parallelism(llama, mesh, of):
    """FSDP gathers the head for the forward of the model that it is sharded with; of one that is sharded apart, the
    weight is gone when the loss needs it."""
    from torch.distributed.fsdp import fully_shard

    wanted = gradients(llama)
    ours.install(llama)
    parallel = nn.parallel.DistributedDataParallel(llama) if of == "ddp" else fully_shard(llama, mesh=mesh)
    outputs, grads = gradients(parallel)
    whole = {name.removeprefix("module."): getattr(g, "full_tensor", lambda g=g: g)() for name, g in grads.items()}
    assert_same((outputs, whole), wanted)
    assert outputs.logits is None


def test_a_head_that_is_sharded_apart(llama, mesh):
    from torch.distributed.fsdp import fully_shard

    llama.lm_head.weight = nn.Parameter(llama.lm_head.weight.detach().clone())
    ours.install(llama)
    fully_shard(llama.lm_head, mesh=mesh)
    with pytest.raises(TypeError, match=r"must be a torch.nn.Linear.*got FSDPLinear"):
        fully_shard(llama, mesh=mesh)(**runs.batch())


def test_a_head_that_is_wrapped_afterwards(llama):
    ours.install(llama)
    llama.lm_head = Wrapped(llama.lm_head)
    with pytest.raises(TypeError, match="merge it first"):
        llama(**runs.batch())


def test_options_of_the_head_are_looked_at(llama):
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.lm_head can't be fused: chunk_bytes must be"):
        ours.install(llama, chunk_bytes=0)


def test_a_loss_that_somebody_replaced(llama, monkeypatch):
    monkeypatch.setattr("transformers.loss.loss_utils.ForCausalLMLoss", lambda **_: 0)
    with pytest.raises(RuntimeError, match=r"loss_utils.ForCausalLMLoss was replaced, by .*test_transformers's"):
        ours.install(llama)


def test_not_a_language_model():
    with pytest.raises(TypeError, match="model must be a causal language model of transformers, got Linear"):
        ours.install(nn.Linear(2, 2))


FORWARDS = {  # what follows the head, and what is said of it
    "logits = self.lm_head(h)\n loss = self.loss_function(logits, labels)\n return Out(loss, logits=logits)": None,
    "logits = self.lm_head(h).float() / self.config.c\n logits = torch.tanh(logits)\n logits = logits * self.config.c\n"
    " loss = self.loss_function(logits=logits, labels=labels.to(logits.device))\n return (loss,) + (logits,)": None,
    "logits = self.lm_head(h)\n logits = logits + self.bias\n loss = self.loss_function(logits, labels)": "+ self.bias",
    "logits = self.lm_head(h)\n loss = self.loss_function(logits, labels) + logits.logsumexp(-1)": "logits.logsumexp",
    "logits = self.lm_head(h)[..., :9]\n loss = self.loss_function(logits, labels)": "self.lm_head(h)[..., :9]",
    "logits = self.lm_head(h)\n logits[..., 3] = -1e9\n loss = self.loss_function(logits, labels)": "logits[..., 3]",
    "logits = self.lm_head(h)\n logits *= 2\n loss = self.loss_function(logits, labels)": "logits *= 2",
    "logits = 2 * self.lm_head(h)\n loss = self.loss_function(logits, labels)": "2 * self.lm_head(h)",
    "logits = self.lm_head(h)\n logits = self.cap(logits)\n loss = self.loss_function(logits, labels)": "self.cap",
    "logits = torch.sigmoid(self.lm_head(h))\n loss = self.loss_function(logits, labels)": "torch.sigmoid",
    "logits = self.decoder(h)\n loss = self.loss_function(logits, labels)": "does not call self.lm_head",
    "logits = self.lm_head(h)\n loss = cross_entropy(logits=logits)": "computes no loss by self.loss_function",
}


@pytest.mark.parametrize(("body", "said"), FORWARDS.items())
def test_what_a_forward_does_with_logits(body, said, tmp_path):
    path = tmp_path / "forward.py"
    path.write_text(f"def forward(self, h, labels):\n {body}\n")
    namespace: dict = {}
    exec(compile(path.read_text(), path, "exec"), namespace)
    if said is None:
        ours._check_use_of_logits(namespace["forward"], "lm_head", "Its")
    else:
        with pytest.raises(ValueError, match=r"^Its: ") as caught:
            ours._check_use_of_logits(namespace["forward"], "lm_head", "Its")
        assert said in str(caught.value)


def test_a_forward_without_source():
    namespace: dict = {}
    exec("def forward(self, labels): ...", namespace)
    with pytest.raises(ValueError, match=r"^Its: the source of its forward is not there"):
        ours._check_use_of_logits(namespace["forward"], "lm_head", "Its")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Bamba", "logits.logsumexp"),  # a loss of its own on the logits
        ("Inkling", "logits[..., :unpadded_vocab_size]"),  # classes cut off
        ("ModernBertDecoder", "self.decoder(self.lm_head(hidden_states))"),  # a layer after the head
        ("Bart", "logits.view"),  # labels that are not shifted
    ],
)
def test_models_of_transformers_that_are_refused(name, said):
    forward = getattr(transformers, f"{name}ForCausalLM").forward
    with pytest.raises(ValueError, match=f"^{name}: its forward does with logits what a fused head can't") as caught:
        ours._check_use_of_logits(forward, "lm_head", name)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "use", [lambda x: x + 1, lambda x: x[..., 0], lambda x: x.argmax(-1), torch.softmax, lambda x: x * torch.ones(2)]
)
def test_logits_that_are_not_made_say_so(use):
    logits = ours.PendingLogits(LinearHead(torch.zeros(2, 4), torch.zeros(9, 4)), "Its")
    with pytest.raises((TypeError, AttributeError)):
        use(logits, -1) if use is torch.softmax else use(logits)


@pytest.mark.parametrize(
    "change", [lambda z: z / 4 * 3, lambda z: (z / 5).tanh() * 5, lambda z: torch.tanh(z * 0.5 / 3) * 3 * 2]
)
def test_scales_and_caps_come_together(change):
    torch.manual_seed(0)
    hidden, weight, labels = torch.randn(1, 6, 8), torch.randn(31, 8), torch.randint(31, (1, 6))
    pending = change(ours.PendingLogits(LinearHead(hidden, weight), "Its"))
    torch.testing.assert_close(
        ours.causal_lm_loss(pending, labels, 31), ForCausalLMLoss(change(hidden @ weight.t()), labels, 31)
    )


# ---- Trainer ----


def test_mixed_precision_of_trainer_and_removing():
    """accelerate wraps the forward that it finds; the head is used below its autocast, and can be taken out."""
    accelerate = pytest.importorskip("accelerate")
    model = runs.model_of("Llama")
    ours.install(model)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model)
    assert gradients(prepared)[0].logits is None
    with pytest.raises(RuntimeError, match=r"^LlamaForCausalLM.forward was wrapped after fused_losses"):
        ours.remove(model)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    ours.remove(model)
    assert gradients(model)[0].logits is not None
    ours.install(model)
    assert gradients(model)[0].logits is None


def test_it_imports_where_transformers_is_not():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from fused_losses.adapters import transformers as t; assert t.install and t.causal_lm_loss"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bound_stock_loss_keeps_what_is_bound(llama):
    """What a partial of transformers' own loss says holds for the head, too; and an upstream is said once."""
    model, labels = llama, torch.randint(V, (2, 8))
    model.loss_function = functools.partial(ForCausalLMLoss, num_items_in_batch=3)
    wanted = model(input_ids=labels, labels=labels).loss
    ours.install(model)
    torch.testing.assert_close(model(input_ids=labels, labels=labels).loss, wanted)
    ours.remove(model)
    model.loss_function = functools.partial(ours.causal_lm_loss, upstream=2.0)
    with pytest.raises(ValueError, match=r"loss_function has an upstream of its own, 2\.0"):
        ours.install(model, upstream=8.0)


def test_upstream_of_install_reaches_our_own_loss(llama):
    model = llama
    model.loss_function = ours.causal_lm_loss
    ours.install(model, upstream=8.0)
    fused = ours.Fused("lm_head", False, 8.0, {}, None)
    assert fused.loss_function(model).keywords["upstream"] == 8.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"evaluation": "no"}, "evaluation must be True or False, got str"),
        ({"upstream": "x"}, "upstream must be a number or a tensor, got str"),
        ({"upstream": 0}, "upstream must be at least"),
    ],
)
def test_options_are_checked_at_install(llama, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        ours.install(llama, **options)


def test_a_misspelt_option_of_compute_loss_func():
    with pytest.raises(TypeError, match="upstreem"):
        ours.compute_loss_func({"logits": torch.randn(1, 3, 5)}, torch.zeros(1, 3).long(), upstreem=2.0)
    with pytest.raises(ValueError, match="outputs must have logits"):
        ours.compute_loss_func({"loss": 1.0}, torch.zeros(1, 3).long())
