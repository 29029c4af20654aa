"""Pictures that matplotlib draws, in files that replace nothing else."""

import importlib
import importlib.util
import re
from io import BytesIO
from pathlib import Path
from typing import Any

from dsv3.errors import ConfigError
from dsv3.files import Format, NamedFile, check_output, write_output

_FORMAT = Format(
    "a picture that matplotlib drew",
    # In a PDF the name comes last, after bytes of any kind; this second line is matplotlib's own.
    re.compile(rb"(?is)(\x89PNG|<\?xml|%!PS).*matplotlib|%PDF-1\.\d\n%\xac\xdc \xab\xba\n"),
)


def check_picture(file: Path | None) -> None:
    """Raise ConfigError if the file of --plot is given and no picture can be drawn there."""
    if file is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot: matplotlib is not installed; pip install matplotlib")
    canvas = importlib.import_module("matplotlib.backend_bases").FigureCanvasBase
    if _kind(file) not in canvas.get_supported_filetypes():
        raise ConfigError(f"--plot={file}: no format of pictures; use .png, .svg or .pdf")
    check_output(NamedFile("--plot", file), _FORMAT)


def pyplot() -> Any:
    """Return matplotlib's pyplot, which opens no window."""
    importlib.import_module("matplotlib").use("agg")
    return importlib.import_module("matplotlib.pyplot")


def write_picture(figure: Any, file: Path, dpi: int) -> None:
    """Write a figure in the format of the file's suffix."""
    picture = BytesIO()
    figure.savefig(picture, format=_kind(file), dpi=dpi)
    write_output(NamedFile("--plot", file), _FORMAT, picture.getvalue())


def _kind(file: Path) -> str:
    """Return the format of a picture, by the file's name."""
    return file.suffix[1:].lower() or "png"
