"""The package as it is installed, away from the checkout."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import sys
import tomllib
from pathlib import Path
import dsv3, dsv3_kernels
from dsv3 import LLM, SamplingParams
from dsv3.config_files import load_model_config
from dsv3.errors import ConfigError

for package in (dsv3, dsv3_kernels):
    assert Path(package.__file__).is_relative_to(sys.argv[1]), package.__file__
print(load_model_config("v3-671b").num_hidden_layers)
with LLM(sys.argv[2], max_seq_len=512) as llm:
    print(llm.chat([{"role": "user", "content": "What is MLA?"}])[0].text)
try:
    LLM()
except ConfigError as error:
    print(error)
"""


@pytest.mark.slow
def test_an_installed_wheel_has_all_it_needs(tmp_path: Path) -> None:
    pip, quiet = [sys.executable, "-m", "pip"], ["-q", "--no-deps", "--disable-pip-version-check"]
    source = tmp_path / "source"  # a build writes beside its sources
    for name in ("dsv3", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build: list[str | Path] = [
        *pip,
        "wheel",
        *quiet,
        "--no-build-isolation",
        "-w",
        tmp_path,
        source,
    ]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("dsv3-*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", *quiet, "--target", site, wheel], check=True)
    run: list[str | Path] = [
        sys.executable,
        "-P",
        "-c",
        CODE,
        site,
        ROOT / "checkpoints" / "demo-v3",
    ]
    done = subprocess.run(
        run, env={"PYTHONPATH": str(site)}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    layers, answer, error = done.stdout.splitlines()
    assert layers == "61" and answer.startswith("MLA is multi-head latent attention")
    assert error == "give a checkpoint: the demo model is not installed with the package"


def test_every_package_is_installed() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [
        folder.relative_to(source)
        for source, name in ((ROOT, "dsv3"), (ROOT / "kernels", "dsv3_kernels"))
        for folder in (source / name, *(source / name).rglob("*"))
        if (folder / "__init__.py").exists()
    ]
    want = {".".join(folder.parts) for folder in folders} | {"dsv3.presets"}
    assert set(declared["packages"]) == want
