"""Pictures that matplotlib draws, in files that replace nothing else."""

import importlib
import importlib.util
import re
from io import BytesIO
from pathlib import Path
from typing import Any

from dsv3.errors import ConfigError, OutputError
from dsv3.files import Format, NamedFile, check_output, write_output

_FORMAT = Format(
    "a picture that matplotlib drew", re.compile(rb"(?is)(\x89PNG|<\?xml|%!PS).*matplotlib")
)


def check_picture(file: Path | None) -> None:
    """Raise ConfigError if the file of --plot is given and no picture can be drawn there."""
    if file is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is not installed; pip install matplotlib")
    check_output(NamedFile("--plot", file), _FORMAT)


def pyplot() -> Any:
    """Return matplotlib's pyplot, which opens no window."""
    importlib.import_module("matplotlib").use("agg")
    return importlib.import_module("matplotlib.pyplot")


def write_picture(figure: Any, file: Path, dpi: int) -> None:
    """Write a figure in the format of the file's suffix."""
    picture = BytesIO()
    try:
        figure.savefig(picture, format=file.suffix[1:] or "png", dpi=dpi)
    except ValueError as error:
        raise OutputError(f"--plot={file}: cannot be written: {error}") from None
    write_output(NamedFile("--plot", file), _FORMAT, picture.getvalue())
