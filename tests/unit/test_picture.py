"""Pictures replace pictures of all formats, and nothing else."""

from pathlib import Path

import pytest

from dsv3.errors import ConfigError
from picture import check_picture, pyplot, write_picture


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf", "eps"])
def test_a_second_picture_replaces_the_first(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure, file = pyplot().figure(), tmp_path / f"plot.{suffix}"
    write_picture(figure, file, dpi=50)
    check_picture(file)
    write_picture(figure, file, dpi=50)


def test_another_document_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "paper.pdf"
    file.write_bytes(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\nabout matplotlib")
    with pytest.raises(ConfigError, match="not a picture that matplotlib drew"):
        check_picture(file)


def test_an_unknown_format_is_refused_before_measuring(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match=r"no format of pictures; use \.png, \.svg or \.pdf$"):
        check_picture(tmp_path / "plot.docx")
