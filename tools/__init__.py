"""Benchmarks of coordlfs, and the stall analyser. Uses only what coordlfs shows to everybody."""
