"""The stall analyser: measures whether a training job waits for data, and predicts what would change that.

It needs no mount of coordlfs, and must change nothing that the job sees.
"""
