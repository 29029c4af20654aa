"""Our folder `kernels/` beside the PyPI package `kernels`, which transformers looks for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import import_utils

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
# As much of the real package as transformers' models touch while they are imported.
FAKE = """
MARK = "the real one"

def use_kernel_forward_from_hub(name):
    return lambda cls: cls

def use_kernelized_func(*functions):
    return lambda cls: cls

def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {"__init__": lambda self, *args, **kwargs: None})
"""


def run(code: str, *paths: Path) -> None:
    """Run a program in the repository's root, with these folders in front of the path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=env)


def test_the_folder_is_not_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    run(
        """
import importlib.util, os
spec = importlib.util.find_spec("kernels")
# A folder on the path may look like a namespace; only a regular package has a file.
ours = os.path.join(os.getcwd(), "kernels")
assert spec is None or not spec.has_location or not spec.origin.startswith(ours), spec
import dsv3_kernels
assert dsv3_kernels.__file__.endswith("kernels/dsv3_kernels/__init__.py")
""",
        ROOT,
    )


def test_transformers_without_the_real_package() -> None:
    run(
        """
import importlib.metadata
from transformers.utils import is_kernels_available
installed = any(d.name == "kernels" for d in importlib.metadata.distributions())
assert installed or not is_kernels_available()
import transformers.models.deepseek_v3.modeling_deepseek_v3, dsv3_kernels
""",
        ROOT,
    )


def test_transformers_with_the_real_package(tmp_path: Path) -> None:
    version = getattr(import_utils, "KERNELS_MIN_VERSION", "0.99")
    info = tmp_path / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(FAKE)
    run(
        """
import kernels
assert kernels.MARK == "the real one"
from transformers.utils import is_kernels_available
assert is_kernels_available()
import transformers.models.deepseek_v3.modeling_deepseek_v3, dsv3_kernels
""",
        ROOT,
        tmp_path,
    )
