"""Part `cli`: programs as users start them."""

from collections.abc import Sequence

from benchlib.gpu_check.demo_part import CHECKPOINT, PROMPTS
from benchlib.gpu_check.jobs import Job, JobResult
from benchlib.gpu_check.parts import Part, Setup
from benchlib.gpu_check.report import PartResult


def _cli_jobs(setup: Setup) -> list[Job]:
    folder = setup.out / "cli"
    folder.mkdir(exist_ok=True)
    device = "cpu" if setup.rehearse else "cuda"
    kernels = ["launch/bench.py", "kernels", "--ops", "act_quant", "permute"]
    kernels += ["--check"] if setup.rehearse else []
    rank = ["launch/bench.py", "rank", "--config", f"{CHECKPOINT}/config.json", "--world", "2"]
    rank += ["--layers", "2", "--batch", "1", "--context", "64", "--steps", "2", "--device", device]
    profile = ["launch/generate.py", "--profile", "--ckpt-path", CHECKPOINT, "--device", device]
    profile += ["--prompt", PROMPTS[0], "--max-new-tokens", "8"]
    return [
        setup.job(
            "cli_kernels", *kernels, "--json", folder / "kernels.json", interpret=setup.rehearse
        ),
        setup.job("cli_rank", *rank, "--json", folder / "rank.json"),
        setup.job("cli_profile", *profile),
    ]


def _judge_cli(_setup: Setup, results: Sequence[JobResult], part: PartResult) -> None:
    for result in results:
        part.add_end(result.job.name, result.fault, result.out_of_time)
    done = sum(not result.fault for result in results)
    part.summary = f"{done} of {len(results)} programs ended with exit code 0"


CLI = Part(
    name="cli",
    about="programs as users start them: bench.py kernels, bench.py rank, generate.py --profile",
    limit=90,
    typical=60,
    make_jobs=_cli_jobs,
    judge=_judge_cli,
    is_timed=True,
    unproven="the programs ran on the CPU",
)
