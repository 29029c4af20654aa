"""Open a checkpoint directory of any kind as a `Source`.

Known are Hugging Face's (an index over several files, or one file), those that our converter
writes (a file per rank and a manifest), and those that DeepSeek's own converter writes (a file per
rank, its own tensor names, equal slices).
"""

import os
from dataclasses import fields, replace
from pathlib import Path

from dsv3.checkpoint.digest import file_digest
from dsv3.checkpoint.directory import INDEX, check_directory
from dsv3.checkpoint.manifest import DIGEST_KEY, MANIFEST, Manifest, read_manifest
from dsv3.checkpoint.names import is_vision
from dsv3.checkpoint.reader import Piece, Source, TensorInfo
from dsv3.checkpoint.region import region_shape
from dsv3.checkpoint.safetensors_file import read_header
from dsv3.checkpoint.scales import stored_quantization
from dsv3.checkpoint.spelling import HEAD, deepseek_tensors, hugging_face_tensors
from dsv3.checkpoint.stored import StoredFiles, read_stored
from dsv3.checkpoint.unsupported import refuse_unsupported
from dsv3.config import ModelConfig
from dsv3.config_files import load_model_config
from dsv3.errors import CheckpointError, ConfigError
from dsv3.setting_names import SettingName, flag

__all__ = ["INDEX", "check_stored_form", "declared_config", "open_source"]

# Sizes that DeepSeek's own config files do not tell, or tell in another way.
_MAY_DIFFER = {"bos_token_id", "max_position_embeddings", "num_nextn_predict_layers"}

# Other fields that change what the model computes.
_COMPUTATION = (
    *("rope_theta", "rope_scaling", "rope_interleave", "rms_norm_eps"),
    *("scoring_func", "topk_method", "norm_topk_prob", "routed_scaling_factor"),
)


def open_source(
    path: str | Path,
    config: ModelConfig | None = None,
    is_share: bool = False,
    name: SettingName = flag,
) -> Source:
    """Open a checkpoint directory; read its headers, but no tensor.

    Args:
        path: the directory.
        config: what the model is. Needed where the directory has no config.json; elsewhere held
            against it.
        is_share: a directory of ours may hold the files of some ranks only; what is read must be
            in them.
        name: how errors call the setting that `config` comes from.

    Raises:
        CheckpointError: a file is missing, truncated or of unknown kind.
        ConfigError: the model is not supported, or `config` contradicts config.json.
    """
    path = Path(path)
    files = check_stored_form(path)
    declared = declared_config(path, config, name)
    num_unused, model_digest = 0, ""
    if files is None:
        manifest = read_manifest(path)
        tensors, model_digest = _converted(path, manifest, is_share), manifest.model_digest
    elif files.is_ranks:
        tensors = deepseek_tensors(files.tensors, declared)
    else:
        tensors = hugging_face_tensors(files.tensors, declared)
        num_unused = sum(is_vision(tensor.name) for tensor in files.tensors)
    stored = _config_of_stored(declared, tensors)
    return Source(path, stored, tensors, declared, num_unused, model_digest)


def check_stored_form(path: Path) -> StoredFiles | None:
    """Check that a path holds weights in a supported form.

    Needs neither config nor tokenizer, so programs call it before they read those.

    Returns:
        the stored tensors; None for a directory with a manifest, which lists them.

    Raises:
        CheckpointError: saying what the path holds instead.
    """
    check_directory(path)
    if os.path.lexists(path / MANIFEST):
        return None
    files = read_stored(path)
    refuse_unsupported(files.tensors)
    return files


def _config_of_stored(declared: ModelConfig, tensors: dict[str, TensorInfo]) -> ModelConfig:
    """Return the config, corrected by the tensors: whether the head is tied, and FP8 or not."""
    return replace(
        declared,
        tie_word_embeddings=declared.tie_word_embeddings and HEAD not in tensors,
        quantization=stored_quantization(declared.quantization, tensors),
    )


def declared_config(path: Path, given: ModelConfig | None, name: SettingName = flag) -> ModelConfig:
    """Return the directory's own config, if it has one; sizes of `given` may not contradict it.

    Errors call the setting that `given` comes from by its `name`.
    """
    if given is not None and not (path / "config.json").is_file():
        return given
    own = load_model_config(path, tensors_decide=True, name=name)
    if given is None:
        return own
    for field in fields(ModelConfig):
        have, want = getattr(own, field.name), getattr(given, field.name)
        is_size = field.type in (int, int | None) and field.name not in _MAY_DIFFER
        if is_size and have != want:
            where = path / "config.json"
            raise ConfigError(f"{where}: {field.name}={have}, but {name('config')} says {want}")
    ignored = [name for name in _COMPUTATION if getattr(own, name) != getattr(given, name)]
    if not ignored:
        return own
    warning = f"config.json decides, although {name('config')} has another {', '.join(ignored)}"
    return replace(own, warning="; ".join(filter(None, (own.warning, warning))))


def _converted(path: Path, manifest: Manifest, is_share: bool) -> dict[str, TensorInfo]:
    """A directory of ours; each file must be the one that the manifest was written for."""
    shards = {(name, s.rank): s for name, r in manifest.tensors.items() for s in r.shards}
    pieces: dict[str, list[Piece]] = {name: [] for name in manifest.tensors}
    absent = []
    for rank, record in enumerate(manifest.files):
        file = path / record.name
        if not file.is_file():
            absent.append((rank, file))
            if is_share and len(absent) < len(manifest.files):
                continue
            raise CheckpointError(f"{file}: missing, but {MANIFEST} names it")
        header = read_header(file)
        digests = []
        for name, entry in header.entries.items():
            shard = shards.get((name, rank))
            is_same = shard is not None and manifest.tensors[name].dtype == entry.dtype
            if shard is None or not is_same or region_shape(shard.region) != entry.shape:
                raise CheckpointError(f"{file}: tensor {name} is not as {MANIFEST} tells")
            digests.append(shard.digest)
            pieces[name].append(Piece(file, entry.offset, shard.region, shard.digest))
        if (
            header.metadata.get(DIGEST_KEY) != manifest.model_digest
            or header.file_bytes != record.num_bytes
            or file_digest(header.prefix, digests) != record.digest
        ):
            raise CheckpointError(f"{file}: not the file that {MANIFEST} was written for")
    for rank, file in absent:  # behind those that are there: a copy of a slice will do
        for name, tensor in manifest.tensors.items():
            pieces[name] += [Piece(file, 0, s.region) for s in tensor.shards if s.rank == rank]
    return {
        name: TensorInfo(name, r.dtype, r.shape, tuple(pieces[name]), r.digest)
        for name, r in manifest.tensors.items()
    }
