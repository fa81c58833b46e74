"""The companion loader of coordlfs: coordinated prep and epoch-aware hints for PyTorch. Needs torch."""

from coordlfs_loader.hints import Hints
from coordlfs_loader.sampler import HintedSampler

__all__ = ["HintedSampler", "Hints"]
