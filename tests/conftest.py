"""Before anything imports triton: its kernels run in the interpreter, on a CPU, in every test."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
