"""The companion loader of coordlfs: coordinated prep and epoch-aware hints for PyTorch.

What needs torch is imported when it is first asked for: `Hints` is of use to other loaders as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coordlfs_loader.hints import Hints

if TYPE_CHECKING:
    from coordlfs_loader.sampler import HintedSampler

__all__ = ["HintedSampler", "Hints"]


def __getattr__(name: str) -> Any:
    if name == "HintedSampler":
        from coordlfs_loader.sampler import HintedSampler

        return HintedSampler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
