"""Size of the code: lines per package and file, and the longest functions.

python scripts/sizes.py

Blank lines, comments and docstrings are not counted, so that saving on them gains nothing.
"""

import ast
import io
import tokenize
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
AIM = 11_000  # lines of code of dsv3/, everything in it; a report, not a limit
FILE_LIMIT = 400
FUNCTION_LIMIT = 50
_FOLDERS = ("dsv3", "kernels", "launch", "scripts", "tests")


@dataclass(frozen=True)
class Function:
    """A function's place and length in lines, decorators and docstring included."""

    name: str
    file: str
    lines: int


def lines_of_code(text: str) -> int:
    """Count the lines of a source that hold code."""
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
    """Return the functions of a file. A method's length counts; its class's does not."""
    found = []
    for node in ast.walk(ast.parse((root / file).read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            assert node.end_lineno is not None
            found.append(Function(node.name, file, node.end_lineno - first + 1))
    return found


def packages(files: dict[str, int]) -> dict[str, int]:
    """Return the lines of every package: the folder below the top one, or the top one itself."""
    total: dict[str, int] = {}
    for file, lines in files.items():
        package = "/".join(Path(file).parts[:-1][:2])
        total[package] = total.get(package, 0) + lines
    return total


def main() -> None:
    """Print the report."""
    every: dict[str, int] = {}
    for folder in _FOLDERS:
        files = count_lines(ROOT, folder)
        every |= files
        print(f"{sum(files.values()):6,}  {folder}/")
        for package, lines in packages(files).items():
            print(f"{lines:6,}    {package}/")
            if folder in ("dsv3", "kernels"):
                for file, size in files.items():
                    if str(Path(file).parent) == package:
                        print(f"{size:6,}      {Path(file).name}")
    print(f"\nfiles over {FILE_LIMIT} lines of code:")
    for file, lines in every.items():
        if lines > FILE_LIMIT:
            print(f"{lines:6,}  {file}")
    print(f"\nlongest functions of dsv3/ and kernels/ (aim: {FUNCTION_LIMIT}):")
    ours = [
        f for file in every if file.startswith(("dsv3", "kernels")) for f in functions(ROOT, file)
    ]
    for function in sorted(ours, key=lambda f: -f.lines)[:10]:
        print(f"{function.lines:6,}  {function.file}: {function.name}")
    total = sum(count_lines(ROOT, "dsv3").values())
    print(f"\ndsv3/: {total:,} lines of code (aim: under {AIM:,})")


if __name__ == "__main__":
    main()
