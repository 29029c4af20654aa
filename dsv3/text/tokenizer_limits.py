"""Limits for the growth of a text by the normalizers and decoders of a `tokenizer.json`.

They replace characters by others, one after the other: forty of them that double a letter turn a
word into terabytes. The library has no limit, blocks the interpreter meanwhile, and aborts the
process when memory is exhausted.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from dsv3.errors import CheckpointError

MAX_GROWTH = 1000.0  # factor; published tokenizers have up to 3
MAX_ADDED = 1 << 16  # characters or tokens that are added to every text


def check_growth(path: Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Check that a tokenizer cannot make a text excessively long.

    Raises:
        CheckpointError: names the part of the file that can.
    """
    for name in ("normalizer", "decoder"):
        part = getattr(tokenizer, name)
        if part is not None and _growth(_fields(part)) > MAX_GROWTH:
            raise CheckpointError(
                f"{path}: its {name} can make a text {MAX_GROWTH:,.0f} times as long"
            )
    processor = tokenizer.post_processor
    if processor is not None and _num_added(_fields(processor)) > MAX_ADDED:
        raise CheckpointError(f"{path}: its post_processor can add {MAX_ADDED:,} tokens to a text")


def _fields(part: Any) -> dict[str, Any]:
    """Return the JSON of a part of a tokenizer."""
    fields: dict[str, Any] = json.loads(part.__getstate__())
    return fields


def _growth(part: dict[str, Any]) -> float:
    """Return the largest factor by which a normalizer or decoder can lengthen a text."""
    if part["type"] == "Replace":
        # A regular expression may match single characters.
        replaced = max(1, len(part["pattern"].get("String", "")))
        return max(1.0, len(part["content"]) / replaced)
    growth = 1.0 if len(part.get("prepend", "")) <= MAX_ADDED else 2 * MAX_GROWTH
    for inner in part.get("normalizers") or part.get("decoders") or ():
        growth = min(growth * _growth(inner), 2 * MAX_GROWTH)  # stays in the range of a float
    return growth


def _num_added(processor: dict[str, Any]) -> int:
    """Return the number of tokens that a post-processor adds; a repeated text counts as many."""
    total = sum(_num_added(inner) for inner in processor.get("processors") or ())
    special = processor.get("special_tokens") or {}
    num_ids = {name: len(token["ids"]) for name, token in special.items()}
    for piece in processor.get("single") or ():
        if "SpecialToken" in piece:
            total += num_ids.get(piece["SpecialToken"]["id"], 0)
        else:
            total += int(MAX_ADDED / MAX_GROWTH)
    return total
