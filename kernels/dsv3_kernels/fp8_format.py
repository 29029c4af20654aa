"""The FP8 format of activations, weights and cache entries."""

import torch

FP8 = torch.float8_e4m3fn
# Values of a row, and rows of a weight, that share a scale.
BLOCK = 128
