"""What ranks run of test_nemo_rl.py: logits whose vocabulary is sharded, as Megatron's are."""

from __future__ import annotations

from typing import Any

from ranks import Rank
from test_nemo_rl import SEQS, TOKS, V, drawn

from fused_losses.adapters import nemo_rl


def clipped_pg(here: Rank) -> dict[str, Any]:
    logits, data = drawn()
    columns = slice(here.rank * V // here.world, (here.rank + 1) * V // here.world)
    local = logits.detach()[..., columns].clone().requires_grad_()
    loss_fn = nemo_rl.ClippedPGLoss({}, on_logits=True, inplace=True, vocab_parallel_group=lambda: here.group)
    loss, metrics = loss_fn(logits=local * 1, data=data, global_valid_seqs=SEQS, global_valid_toks=TOKS)
    loss.backward()
    return {"loss": metrics["loss"], "gradient": local.grad, "columns": columns}
