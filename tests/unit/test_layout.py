"""Direction of imports between packages, checked on the source."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# A package imports from packages below its level, and within its level without cycles.
LEVELS = {
    "dsv3_kernels": 0,
    "dsv3.distributed": 1,
    "dsv3.cache": 2,
    "dsv3.parallel": 2,
    "dsv3.checkpoint": 3,
    "dsv3.model": 3,
    "dsv3.text": 3,
    "dsv3.engine": 4,
    "dsv3.serve": 5,
    "dsv3.llm": 5,
    "benchlib": 6,
    "launch": 7,
}
SHARED = {"dsv3", "dsv3.config", "dsv3.config_files", "dsv3.errors", "dsv3.request"}
SHARED |= {"dsv3.config_fields", "dsv3.config_hf", "dsv3.config_indexer", "dsv3.config_rope"}
SHARED |= {"dsv3.config_integers"}
SHARED |= {"dsv3.config_quantization", "dsv3.files", "dsv3.read_files", "dsv3.version"}
SHARED |= {"dsv3.arguments", "dsv3.setting_names", "dsv3.settings", "dsv3.sizes", "dsv3.streams"}


def sources() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for package in ("dsv3", "kernels/dsv3_kernels", "launch/benchlib", "launch"):
        pattern = "*.py" if package == "launch" else "**/*.py"
        for path in sorted((ROOT / package).glob(pattern)):
            parts = path.relative_to((ROOT / package).parent).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = sources()


def imported(path: Path) -> set[str]:
    """The full names a file imports: modules, and the names taken out of them."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_of(name: str) -> str | None:
    """The longest of our modules that a full name begins with."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "dsv3" else parts[0]


def edges() -> list[tuple[str, str]]:
    return [
        (name, target)
        for name, path in MODULES.items()
        for full in sorted(imported(path))
        if (target := module_of(full)) is not None
    ]


def test_benchmarks_are_no_part_of_the_runtime() -> None:
    users = {package_of(source) for source, target in edges() if package_of(target) == "benchlib"}
    assert users == {"benchlib", "launch"}


def test_the_packages_are_those_of_the_plan() -> None:
    assert {package_of(name) for name in MODULES} <= LEVELS.keys() | SHARED
    assert len(edges()) > 100


def test_imports_point_down() -> None:
    wrong = []
    for source, target in edges():
        a, b = package_of(source), package_of(target)
        if b in SHARED or a == b or source == "dsv3":  # it hands out doors, when asked for
            continue
        if a in SHARED or LEVELS[b] > LEVELS[a]:
            wrong.append(f"{source} imports {target}")
    assert not wrong


def test_packages_of_one_level_have_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for source, target in edges():
        a, b = package_of(source), package_of(target)
        if a != b and b not in SHARED:
            graph.setdefault(a, set()).add(b)
    TopologicalSorter(graph).prepare()


def test_modules_have_no_cycles() -> None:
    graph: dict[str, set[str]] = {}
    for source, target in edges():
        if source != target:
            graph.setdefault(source, set()).add(target)
    TopologicalSorter(graph).prepare()


def test_one_package_imports_torch_distributed() -> None:
    """No layer calls torch.distributed: collectives are handed to it."""
    users = {
        name
        for name, path in MODULES.items()
        for full in imported(path)
        # elastic and run are torchrun: how ranks are started, and its failure reports.
        if full.startswith("torch.distributed")
        and not full.startswith(("torch.distributed.elastic.", "torch.distributed.run."))
    }
    assert {package_of(name) for name in users} == {"dsv3.distributed"}


def test_the_runtime_does_not_import_transformers() -> None:
    """Benchmarks may measure it: they import it by name, if a flag asks for it."""
    for name, path in MODULES.items():
        assert not any(full.startswith("transformers") for full in imported(path)), name


def torch_free() -> list[str]:
    """Modules that work without torch: configs, text, everything about files but loading."""
    packages = ("dsv3.checkpoint", "dsv3.text")
    names = [n for n in MODULES if n in SHARED or package_of(n) in packages]
    return [n for n in names if n != "dsv3.checkpoint.load"]


def test_reading_and_converting_need_no_torch() -> None:
    code = f"""
import importlib, sys
for name in {torch_free()!r}:
    importlib.import_module(name)
    heavy = {{"torch", "transformers", "triton"}} & sys.modules.keys()
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("from dsv3.engine import engine", "dsv3.engine.engine"),
        ("import dsv3.engine.engine as e", "dsv3.engine.engine"),
        ("from dsv3.engine.engine import Engine", "dsv3.engine.engine"),
        ("from dsv3_kernels import rmsnorm", "dsv3_kernels"),
        ("from dsv3_kernels.moe.route import Routing", "dsv3_kernels.moe.route"),
        ("import torch", None),
    ],
)
def test_imports_are_understood(tmp_path: Path, line: str, wanted: str | None) -> None:
    file = tmp_path / "some.py"
    file.write_text(f"def f():\n    {line}\n")
    assert {module_of(full) for full in imported(file)} == {wanted}
