"""The flags of serve.py, and their checks."""

import argparse
from importlib.util import find_spec
from pathlib import Path

from dsv3.errors import ConfigError
from dsv3.read_files import read_text
from dsv3.setting_names import flag
from generate_flags import add_sampling_flags
from program import Parser, add_engine_flags

_PACKAGES = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "prometheus_client": "prometheus-client",
}


def parse_args() -> argparse.Namespace:
    """Parse the command line, and check that the packages of the server are installed."""
    parser = Parser(description="Serve a DeepSeek-V3-family model, split over ranks, over HTTP.")
    add_server_flags(parser.add_argument_group("server"))
    add_sampling_flags(
        parser.add_argument_group(
            "sampling, for requests without own values (a checkpoint may have other defaults)"
        )
    )
    add_engine_flags(parser)
    args = parser.parse_args()
    check_packages()
    check_flags(args)
    return args


def add_server_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags of the address, the access and the limits."""
    add = group.add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is all interfaces")
    add("--port", type=int, default=8000, help="port to listen on; 0 selects a free one")
    add("--served-model-name", help="name of the model (default: that of the checkpoint)")
    add("--api-key", action="append", help="a key that clients must send; may be given repeatedly")
    add("--api-key-file", help="file of such keys, one per line")
    add(
        "--cors",
        action="append",
        metavar="ORIGIN",
        help="origin of web pages that may send requests; * is all",
    )
    text = "queued completions beyond the running ones; more are refused with status 429"
    add("--max-waiting", type=int, default=1024, help=text)
    add("--max-body-bytes", type=int, default=16 << 20, help="longest body of a request")
    add("--request-seconds", type=float, help="cut answers after this time (default: never)")
    text = "after SIGTERM, time for open answers and for saving the cache (torchrun kills after 30)"
    add("--drain-seconds", type=float, default=20.0, help=text)
    add("--prewarm", help="file of prompts to compute first and keep in the cache")


def check_packages() -> None:
    """Raise ConfigError if a package of the extra `serve` is missing."""
    missing = [name for module, name in _PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise ConfigError(f'serving needs {", ".join(missing)}: pip install "dsv3[serve]"')


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError for values out of range."""
    least = {"max_waiting": 0, "max_body_bytes": 1024, "request_seconds": 0.1, "drain_seconds": 0}
    for name, limit in least.items():
        value = getattr(args, name)
        if value is not None and not value >= limit:
            raise ConfigError(f"{flag(name)}={value} must be at least {limit}")


def api_keys(args: argparse.Namespace) -> list[str]:
    """Return the keys of the flags."""
    keys = list(args.api_key or ())
    if args.api_key_file:
        lines = read_text(Path(args.api_key_file), ConfigError).splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ConfigError(f"--api-key-file={args.api_key_file} has no key in it")
        keys += found
    return keys
