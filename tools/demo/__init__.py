"""The demonstration behind `tools/demo.sh`: one training script, directly on a dataset and on a mount of it."""
