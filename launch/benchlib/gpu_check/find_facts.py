"""Prints the facts about this machine and its GPUs as JSON; opens the first GPU.

python -m benchlib.gpu_check.find_facts
"""

import importlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
from dataclasses import asdict

import torch

from benchlib.gpu_check.facts import Facts

# Import names of the packages that a run needs, besides torch.
_NEEDED = (
    "triton",
    "safetensors",
    "numpy",
    "yaml",
    "tokenizers",
    "huggingface_hub",
    "jinja2",
    "tqdm",
)


def find_facts() -> Facts:
    """Return the facts."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    free = total = 0
    if count:
        free, total = torch.cuda.mem_get_info(0)
    compilers = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return Facts(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
        triton=_version("triton"),
        driver=_driver(),
        gpus=tuple(torch.cuda.get_device_name(i) for i in range(count)),
        capability=".".join(map(str, torch.cuda.get_device_capability(0))) if count else "",
        memory_gib=round(total / 2**30, 2),
        free_gib=round(free / 2**30, 2),
        missing=tuple(name for name in _NEEDED if importlib.util.find_spec(name) is None),
        compiler=next((c for c in compilers if c and shutil.which(c)), ""),
        cores=len(os.sched_getaffinity(0)),
    )


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return ""
    return str(importlib.import_module(package).__version__)


def _driver() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


if __name__ == "__main__":
    print(json.dumps(asdict(find_facts())))
