"""The size report, and the one limit that is checked: the length of a function."""

from pathlib import Path

import pytest

from scripts.sizes import ROOT, count_lines, functions, main, packages

SOURCE = '''"""What it is.

More of it.
"""

import os  # counted
# not counted

@property
def f():
    """One line."""

    return """
    a string
    """
b = 2
'''


def test_no_function_is_too_long() -> None:
    """50 lines is the aim; 120 is the limit of a kernel, whose parameters take a line each."""
    files = [f for folder in ("dsv3", "kernels") for f in count_lines(ROOT, folder)]
    long = [f for file in files for f in functions(ROOT, file) if f.lines > 120]
    assert len(files) > 40 and not long


def test_counting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "pkg" / "package" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "pkg" / "top.py").write_text("a = 1\n")
    (package / "x.py").write_text(SOURCE)
    files = count_lines(tmp_path, "pkg")
    assert files == {"pkg/package/inner/x.py": 7, "pkg/top.py": 1}
    assert packages(files) == {"pkg/package": 7, "pkg": 1}
    assert [(f.name, f.lines) for f in functions(tmp_path, "pkg/package/inner/x.py")] == [("f", 7)]
    main()
    assert "dsv3/engine/" in capsys.readouterr().out
