"""Answer one long prompt in a process of its own; print the bytes that its steps needed at most.

    python tests/long_prompt.py CHECKPOINT TOKENS

Memory is that of the process: the high-water mark of its resident pages, less those before the
first step and those of the cache, which has more to store.
"""

import sys
from pathlib import Path

import torch

from dsv3.request import SamplingParams
from tests.oracle.run import answers, start_alone

_STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """Return VmRSS (now) or VmHWM (the most since the last reset) in bytes."""
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path, num_tokens = Path(sys.argv[1]), int(sys.argv[2])
    started = start_alone(path, kv_cache_size=f"{num_tokens + 64}tok", max_batch_tokens=512)
    prompt = torch.randint(2, 300, (num_tokens,)).tolist()
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    answers(started, [prompt[:200]], params)  # torch's own buffers
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    answers(started, [prompt], params)
    cached = num_tokens * started.cache.layout.position_bytes
    sys.stdout.write(f"{resident('VmHWM') - before - cached}\n")


main()
