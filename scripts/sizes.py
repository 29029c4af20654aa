"""Report the lines of code per package and file, and the longest functions.

    python scripts/sizes.py

Blank lines, comments and docstrings are not counted.
"""

import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AIM = 11_000  # lines of code of dsv3/; a report, not a limit
FILE_LIMIT = 400
FUNCTION_LIMIT = 50
_FOLDERS = ("dsv3", "kernels", "launch", "scripts", "tests")


@dataclass(frozen=True)
class Function:
    """A function, its file, and its length in lines with decorators and docstring."""

    name: str
    file: str
    lines: int


def lines_of_code(text: str) -> int:
    """Return the number of lines with code in a source."""
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def count_lines(root: Path, folder: str) -> dict[str, int]:
    """Return the lines of code of every Python file below a folder, by path from `root`."""
    files = sorted((root / folder).rglob("*.py"))
    return {str(f.relative_to(root)): lines_of_code(f.read_text("utf-8")) for f in files}


def functions(root: Path, file: str) -> list[Function]:
    """Return the functions and methods of a file."""
    found: list[Function] = []
    for node in ast.walk(ast.parse((root / file).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None
            found.append(Function(node.name, file, node.end_lineno - first + 1))
    return found


def packages(files: dict[str, int]) -> dict[str, int]:
    """Return the lines of each package: a folder in a top folder, or the top folder itself."""
    total: dict[str, int] = {}
    for file, lines in files.items():
        package = "/".join(Path(file).parts[:-1][:2])
        total[package] = total.get(package, 0) + lines
    return total


def main() -> None:
    """Print the report."""
    all_files: dict[str, int] = {}
    for folder in _FOLDERS:
        files = count_lines(ROOT, folder)
        all_files |= files
        print(f"{sum(files.values()):6,}  {folder}/")
        for package, lines in packages(files).items():
            print(f"{lines:6,}    {package}/")
            if folder in ("dsv3", "kernels"):
                for file, size in files.items():
                    if str(Path(file).parent) == package:
                        print(f"{size:6,}      {Path(file).name}")
    print_limits(all_files)


def print_limits(all_files: dict[str, int]) -> None:
    """Print the files and functions that are too long, and the size of dsv3/."""
    print(f"\nfiles over {FILE_LIMIT} lines of code:")
    for file, lines in all_files.items():
        if lines > FILE_LIMIT:
            print(f"{lines:6,}  {file}")
    print(f"\nlongest functions of dsv3/ and kernels/ (aim: {FUNCTION_LIMIT}):")
    measured: list[Function] = []
    for file in all_files:
        if file.startswith(("dsv3", "kernels")):
            measured += functions(ROOT, file)
    for function in sorted(measured, key=lambda f: -f.lines)[:10]:
        print(f"{function.lines:6,}  {function.file}: {function.name}")
    total = sum(count_lines(ROOT, "dsv3").values())
    print(f"\ndsv3/: {total:,} lines of code (aim: under {AIM:,})")


if __name__ == "__main__":
    main()
