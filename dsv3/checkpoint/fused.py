"""Routed experts stored as one 3-D tensor per layer, as by transformers 5.

For each expert, `experts.gate_up_proj` [E, 2F, H] holds the rows of gate_proj, then the rows of
up_proj; `experts.down_proj` is [E, H, F]. A projection of one expert is a contiguous range of
bytes, so each becomes a tensor under its usual name, without a copy.

FP8 scales are fused in the same way, also next to weights stored per expert. MLX stacks gate_proj
and up_proj separately, as `switch_mlp`.

Source: transformers 5.24, DeepseekV3Experts and FP8Experts; mlx-lm, deepseek_v3.py.
"""

import math
import re
from collections.abc import Iterator

from dsv3.checkpoint.names import scale_name
from dsv3.checkpoint.reader import Piece, TensorInfo
from dsv3.checkpoint.region import whole
from dsv3.checkpoint.safetensors_file import tensor_bytes
from dsv3.checkpoint.sharding import BLOCK, scale_shape
from dsv3.checkpoint.stored import StoredTensor
from dsv3.config import ModelConfig
from dsv3.errors import CheckpointError

_NAME = re.compile(
    r"(?P<mlp>model\.layers\.\d+\.mlp)\.(?:experts|switch_mlp)\."
    r"(?P<proj>gate_up_proj|gate_proj|up_proj|down_proj)(?:[._]weight)?(?P<scale>_scale(?:_inv)?)?"
)


def split_experts(tensor: StoredTensor, name: str, config: ModelConfig) -> Iterator[TensorInfo]:
    """Yield the tensors of single experts in a fused tensor; yield nothing for other tensors.

    Args:
        tensor: the stored tensor.
        name: its name without the prefixes of wrappers.
        config: the model, with the number and width of the experts.

    Raises:
        CheckpointError: the shape contradicts the config, or gate_proj and up_proj share scales.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return
    is_scale = match["scale"] is not None
    projections = ["gate_proj", "up_proj"] if match["proj"] == "gate_up_proj" else [match["proj"]]
    shape = _shape(config, match["proj"], is_scale)
    _check_shape(tensor, name, config, (len(projections), *shape), is_scale)
    size = tensor_bytes(tensor.entry.dtype, shape)
    offset = tensor.entry.offset
    for expert in range(config.n_routed_experts):
        for projection in projections:
            full = f"{match['mlp']}.experts.{expert}.{projection}.weight"
            full = scale_name(full) if is_scale else full
            piece = Piece(tensor.file, offset, whole(shape))
            yield TensorInfo(full, tensor.entry.dtype, shape, (piece,))
            offset += size


def _shape(config: ModelConfig, projection: str, is_scale: bool) -> tuple[int, int]:
    """Return the shape of one projection of one expert, or of its scales."""
    rows = config.moe_intermediate_size
    cols = config.hidden_size
    if projection == "down_proj":
        rows, cols = cols, rows
    scale_rows, scale_cols = scale_shape((rows, cols))
    return (scale_rows, scale_cols) if is_scale else (rows, cols)


def _check_shape(
    tensor: StoredTensor,
    name: str,
    config: ModelConfig,
    parts: tuple[int, int, int],
    is_scale: bool,
) -> None:
    count, rows, cols = parts
    width = config.moe_intermediate_size
    if is_scale and count > 1 and width % BLOCK:
        raise CheckpointError(
            f"{tensor.file}: tensor {name} has the scales of experts fused as transformers 5 does; "
            f"moe_intermediate_size={width} is not a multiple of {BLOCK}, so gate_proj and up_proj "
            "share blocks and cannot be separated; save the experts one by one"
        )
    wanted = (config.n_routed_experts, count * rows, cols)
    if tensor.entry.shape != wanted:
        is_turned = tensor.entry.shape == (wanted[0], wanted[2], wanted[1])
        raise CheckpointError(
            f"{tensor.file}: tensor {name} is {list(tensor.entry.shape)}, the config makes fused "
            f"experts {list(wanted)} ({math.prod(wanted)} values; n_routed_experts="
            f"{config.n_routed_experts}, moe_intermediate_size={width}, hidden_size="
            f"{config.hidden_size})" + ("; transposed ones are not read" if is_turned else "")
        )
