"""Compare a server's tokens per second with a batch file's, in one run.

    python scripts/server_overhead.py [--requests 64] [--turns 5] [--ranks 1]

Each turn answers the same requests (32 tokens of prompt, 128 of answer, the demo model) by
`generate.py --input-file`, then by `serve.py` to as many clients at once: as streams, then as whole
answers. The clients run on the same machine.
"""

import argparse
import asyncio
import json
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
PROMPT, ANSWER = 32, 128  # tokens
FLAGS = ("--no-prefix-reuse",)
Body = dict[str, object]


def main() -> None:
    """Print the ratios of each turn and their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=64, help="requests, all at once")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    args = parser.parse_args()
    random.seed(0)
    bodies: list[Body] = [
        {
            "prompt": [random.randrange(100, 400) for _ in range(PROMPT)],
            "max_tokens": ANSWER,
            "temperature": 0,
            "ignore_eos": True,
        }
        for _ in range(args.requests)
    ]
    ratios: list[tuple[float, float]] = []
    with server(args.ranks) as port:
        asyncio.run(clients(port, bodies, stream=True))  # warm-up
        for _ in range(args.turns):
            batch = batch_file(args.ranks, bodies)
            streams = asyncio.run(clients(port, bodies, stream=True))
            whole = asyncio.run(clients(port, bodies, stream=False))
            ratios.append((streams / batch, whole / batch))
            print(
                f"batch file {batch:.0f} tok/s, streams {streams:.0f} ({streams / batch:.2f}), "
                f"whole answers {whole:.0f} ({whole / batch:.2f})",
                flush=True,
            )
    streams, whole = map(statistics.median, zip(*ratios, strict=True))
    print(f"medians: streams {streams:.2f}, whole answers {whole:.2f} of the batch file")


def torchrun(ranks: int, program: str, *flags: str) -> list[str]:
    """Return the command of a launcher."""
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [sys.executable, *run, str(LAUNCH / program), *flags, *FLAGS]


def batch_file(ranks: int, bodies: Sequence[Body]) -> float:
    """Answer a batch file; return the tokens per second that generate.py reports."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "in.jsonl"
        head = {"method": "POST", "url": "/v1/completions"}
        lines = [head | {"custom_id": str(i), "body": body} for i, body in enumerate(bodies)]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        files = ("--input-file", str(rows), "--output-file", f"{folder}/out.jsonl")
        command = torchrun(ranks, "generate.py", *files)
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"(\d+) tokens in .*, (\d+) tok/s", done.stderr)
    assert found and int(found[1]) == ANSWER * len(bodies), done.stderr
    return float(found[2])


@contextmanager
def server(ranks: int) -> Iterator[int]:
    """Run a server; yield its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = torchrun(ranks, "serve.py", "--port", str(port))
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        while not is_ready(port):
            assert process.poll() is None, f"the server has ended: {command}"
            time.sleep(0.2)
        yield port
    finally:
        process.terminate()
        process.wait()


def is_ready(port: int) -> bool:
    """Return True if a server has loaded its model."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
            return True
    except (urllib.error.URLError, OSError):
        return False


async def clients(port: int, bodies: Sequence[Body], stream: bool) -> float:
    """Send all requests at once; return the tokens per second of the answers."""
    begin = time.perf_counter()
    await asyncio.gather(*(client(port, body, stream) for body in bodies))
    return ANSWER * len(bodies) / (time.perf_counter() - begin)


async def client(port: int, body: Body, stream: bool) -> None:
    """Read one answer to its end, and check its length."""
    usage = {"stream_options": {"include_usage": True}} if stream else {}
    data = json.dumps({**body, "stream": stream, **usage}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    writer.write(head.encode() + data)
    answer = b"".join([line async for line in reader])
    writer.close()
    count = re.search(rb'"completion_tokens": ?(\d+)', answer)
    assert count and int(count[1]) == ANSWER, answer[-500:]


if __name__ == "__main__":
    main()
