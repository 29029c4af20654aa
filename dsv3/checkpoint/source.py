"""Open a checkpoint directory of any kind as a `Source`.

Supported are directories of Hugging Face (one file, or several with an index), of our converter (a
file per rank and a manifest), and of DeepSeek's converter (a file per rank, other tensor names,
equal slices).
"""

import os
from dataclasses import fields, replace
from pathlib import Path

from dsv3.checkpoint.directory import INDEX, check_directory
from dsv3.checkpoint.manifest import DIGEST_KEY, MANIFEST, Manifest, read_manifest
from dsv3.checkpoint.names import is_vision
from dsv3.checkpoint.reader import Piece, Source, TensorInfo
from dsv3.checkpoint.region import region_shape
from dsv3.checkpoint.safetensors_file import read_header
from dsv3.checkpoint.spelling import HEAD, deepseek_tensors, hugging_face_tensors
from dsv3.checkpoint.stored import StoredFiles, read_stored
from dsv3.checkpoint.stored_quantization import stored_integers, stored_quantization
from dsv3.checkpoint.unsupported import refuse_unsupported
from dsv3.config import ModelConfig
from dsv3.config_files import load_model_config
from dsv3.errors import CheckpointError, ConfigError
from dsv3.setting_names import SettingName, flag

__all__ = ["INDEX", "check_stored_form", "declared_config", "open_source"]

# Sizes that DeepSeek's own config files lack, or state differently.
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
        config: the model's config. Required if the directory has no config.json; otherwise
            checked against it.
        is_share: accept a converted directory with the files of some ranks only; reading from
            others is an error.
        name: returns the name of the setting of `config` for errors.

    Raises:
        CheckpointError: a file is missing, truncated or of unknown kind.
        ConfigError: the model is not supported, or `config` contradicts config.json.
    """
    path = Path(path)
    files = check_stored_form(path)
    declared = declared_config(path, config, name)
    num_unused = 0
    model_digest = ""
    if files is None:
        manifest = read_manifest(path)
        model_digest = manifest.model_digest
        tensors = _converted(path, manifest, is_share)
    elif files.is_ranks:
        tensors = deepseek_tensors(files.tensors, declared)
    else:
        tensors = hugging_face_tensors(files.tensors, declared)
        num_unused = sum(is_vision(tensor.name) for tensor in files.tensors)
    stored = _config_of_stored(declared, tensors)
    return Source(path, stored, tensors, declared, num_unused, model_digest)


def check_stored_form(path: Path) -> StoredFiles | None:
    """Check that a path has weights in a supported format.

    The check needs neither config nor tokenizer, so programs run it before they read those.

    Returns:
        the stored tensors; None for a directory with a manifest, which lists them.

    Raises:
        CheckpointError: describes the contents of the path.
    """
    check_directory(path)
    if os.path.lexists(path / MANIFEST):
        return None
    files = read_stored(path)
    refuse_unsupported(files.tensors)
    return files


def _config_of_stored(declared: ModelConfig, tensors: dict[str, TensorInfo]) -> ModelConfig:
    """Return the config with tied head and quantization corrected by the stored tensors."""
    return replace(
        declared,
        tie_word_embeddings=declared.tie_word_embeddings and HEAD not in tensors,
        quantization=stored_quantization(declared.quantization, tensors),
        integers=stored_integers(declared, tensors),
    )


def declared_config(path: Path, given: ModelConfig | None, name: SettingName = flag) -> ModelConfig:
    """Return the directory's config if it has one; raise if sizes of `given` contradict it.

    `name` returns the name of the setting of `given` for errors.
    """
    if given is not None and not (path / "config.json").is_file():
        return given
    own = load_model_config(path, tensors_decide=True, name=name)
    if given is None:
        return own
    for field in fields(ModelConfig):
        have = getattr(own, field.name)
        want = getattr(given, field.name)
        is_size = field.type in (int, int | None) and field.name not in _MAY_DIFFER
        if is_size and have != want:
            file = path / "config.json"
            raise ConfigError(f"{file}: {field.name}={have}, but {name('config')} says {want}")
    ignored = [name for name in _COMPUTATION if getattr(own, name) != getattr(given, name)]
    if not ignored:
        return own
    warning = f"config.json decides, although {name('config')} has another {', '.join(ignored)}"
    return replace(own, warning="; ".join(filter(None, (own.warning, warning))))


def _converted(path: Path, manifest: Manifest, is_share: bool) -> dict[str, TensorInfo]:
    """Return the tensors of a converted directory; raise if a file is not the manifest's."""
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
        for name, entry in header.entries.items():
            shard = shards.get((name, rank))
            is_same = shard is not None and manifest.tensors[name].dtype == entry.dtype
            if shard is None or not is_same or region_shape(shard.region) != entry.shape:
                raise CheckpointError(f"{file}: tensor {name} differs from its entry in {MANIFEST}")
            pieces[name].append(Piece(file, entry.offset, shard.region, shard.digest))
        is_of_model = header.metadata.get(DIGEST_KEY) == manifest.model_digest
        if not is_of_model or header.file_bytes != record.num_bytes:
            raise CheckpointError(f"{file}: not the file that {MANIFEST} was written for")
    for rank, file in absent:  # after the present files, so that these are read first
        for name, tensor in manifest.tensors.items():
            pieces[name] += [Piece(file, 0, s.region) for s in tensor.shards if s.rank == rank]
    return {
        name: TensorInfo(name, r.dtype, r.shape, tuple(pieces[name]), r.digest)
        for name, r in manifest.tensors.items()
    }
