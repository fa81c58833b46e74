"""The companion loader of coordlfs: coordinated prep and epoch-aware hints for PyTorch. Needs torch.

What needs torch is imported when it is asked for: the broker, `coordlfs groups` and `Hints` do without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordlfs_loader.hints import Hints
from coordlfs_loader.wire import Refused

if TYPE_CHECKING:
    from coordlfs_loader.loader import CoordinatedLoader
    from coordlfs_loader.randomness import Seeded, epoch_seed, sample_seed
    from coordlfs_loader.sampler import HintedSampler

__all__ = ["CoordinatedLoader", "HintedSampler", "Hints", "Refused", "Seeded", "epoch_seed", "sample_seed"]

_MODULES = {
    "CoordinatedLoader": "loader",
    "HintedSampler": "sampler",
    "Seeded": "randomness",
    "epoch_seed": "randomness",
    "sample_seed": "randomness",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
