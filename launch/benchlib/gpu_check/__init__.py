"""Checks a machine's GPUs, and measures them, in one command: `scripts/gpu_check.sh`.

The process that runs the check never touches a GPU. Each part of the check (`parts.py`) is a list
of jobs: commands in separate processes (`jobs.py`), most of them the project's own programs.
A job that hangs or crashes, or whose process can no longer use its GPU, costs one case.
"""
