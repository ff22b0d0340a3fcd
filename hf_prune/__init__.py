"""hf_prune: make a transformers checkpoint truly smaller and faster, repair it, and save it so that it reloads.

Importing the package teaches transformers to open pruned checkpoints (see `hf_prune.checkpoint.loader`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .checkpoint.loader import install_loader

if TYPE_CHECKING:
    from .checkpoint.proof import verify
    from .checkpoint.save import save_pretrained
    from .config import DistillationConfig, PruningConfig
    from .model.anatomy import describe
    from .model.families import register_family
    from .oneshot import PruneResult, analyze, prune
    from .plan import PruningPlan
    from .report.measure import measure
    from .streaming import prune_checkpoint
    from .train.callback import PruningCallback
    from .train.trainer import PruningMixin, PruningSeq2SeqTrainer, PruningTrainer

__all__ = [
    "DistillationConfig",
    "PruneResult",
    "PruningCallback",
    "PruningConfig",
    "PruningMixin",
    "PruningPlan",
    "PruningSeq2SeqTrainer",
    "PruningTrainer",
    "analyze",
    "describe",
    "measure",
    "prune",
    "prune_checkpoint",
    "register_family",
    "save_pretrained",
    "verify",
]

_HOME = {
    "DistillationConfig": "config",
    "PruneResult": "oneshot",
    "PruningCallback": "train.callback",
    "PruningConfig": "config",
    "PruningMixin": "train.trainer",
    "PruningPlan": "plan",
    "PruningSeq2SeqTrainer": "train.trainer",
    "PruningTrainer": "train.trainer",
    "analyze": "oneshot",
    "describe": "model.anatomy",
    "measure": "report.measure",
    "prune": "oneshot",
    "prune_checkpoint": "streaming",
    "register_family": "model.families",
    "save_pretrained": "checkpoint.save",
    "verify": "checkpoint.proof",
}

install_loader()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_prune' has no attribute {name!r}; public names: {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
