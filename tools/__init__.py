"""What stands around coordlfs: analyser, simulator, benchmarks, soak, demonstration.

coordlfs must not import it, but for its commands `analyze`, `simulate` and `bench`, which load it when they are called.
"""
