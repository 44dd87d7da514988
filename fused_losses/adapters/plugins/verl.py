"""Importing this installs :mod:`fused_losses.adapters.verl`: for ``VERL_USE_EXTERNAL_MODULES``, which verl imports at
its own start in every process, and for ``actor_rollout_ref.model.external_lib``.

    VERL_USE_EXTERNAL_MODULES=fused_losses.adapters.plugins.verl python -m verl.trainer.main_ppo ...
"""

from __future__ import annotations

from .. import verl

verl.install()
