"""The companion loader of coordlfs: coordinated prep and epoch-aware hints for PyTorch. Needs torch."""
