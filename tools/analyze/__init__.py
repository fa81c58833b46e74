"""The stall analyser: measures whether a training job waits for data, and predicts what would change that."""
