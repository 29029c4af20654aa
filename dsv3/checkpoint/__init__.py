"""Checkpoints: which tensors a model has, who holds which slice, reading, converting, loading."""
