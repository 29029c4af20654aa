"""The chat under torchrun at a terminal: typing, Ctrl-C, Ctrl-D, idling, dying."""

import os
import time
from pathlib import Path

from tests.programs import ALONE, GENERATE, HANG_SECONDS, AtTerminal, ranks_of, run, torchrun

CHAT = [GENERATE, "--interactive"]
# Whatever waits longer than a second without being told that it may is found out.
IMPATIENT = f"""
import datetime, runpy, sys
from torch.distributed import distributed_c10d
distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=1)
sys.argv[0] = {GENERATE!r}
runpy.run_path({GENERATE!r}, run_name="__main__")
"""
RIGHT, UP = "\x1b[C", "\x1b[A"


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_gone(pid: int) -> bool:
    deadline = time.monotonic() + HANG_SECONDS
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not Path(f"/proc/{pid}").exists()


def test_a_chat_from_greeting_to_goodbye(tmp_path: Path) -> None:
    program = tmp_path / "impatient.py"
    program.write_text(IMPATIENT)
    command = [*torchrun(2), str(program), "--interactive", "--rank-timeout", "3"]
    with AtTerminal(command) as chat:
        chat.wait_for("/help lists the commands, Ctrl-D leaves)\n>>> ")
        chat.type("y nme is Anna.\x01M" + 3 * RIGHT + "a\r")  # Ctrl-A
        chat.wait_for(">>> My name is Anna.\nNoted.\n\n>>> ")

        ranks = ranks_of(chat.process.pid)
        assert sorted(ranks) == [0, 1]
        before = sum(map(cpu_seconds, ranks.values()))
        time.sleep(4)  # idle, for longer than an impatient world and its watch allow
        assert sum(map(cpu_seconds, ranks.values())) - before < 1.0
        chat.type("\x1b[200~What is\rmy name?\x1b[201~")  # pasted
        chat.wait_for("    my name?")
        chat.type("\x15What is my name?\r")
        chat.wait_for("Your name is Anna.\n\n>>> ")

        chat.type("/stats\r")
        assert " reused, " in chat.wait_for("\ncache ")
        chat.type("/clear\r")
        chat.wait_for("(a new conversation)")
        chat.type(UP + UP + UP + "\r")
        chat.wait_for(">>> What is my name?\nI do not know that yet.\n\n>>> ")

        chat.type("half a li\x03")
        chat.wait_for("half a li^C\n>>> ")
        chat.type("\x1a\x03")  # Ctrl-Z is nothing; Ctrl-C in an empty line
        chat.wait_for("(Ctrl-D or /exit leaves the chat)\n>>> ")
        chat.type("\x04")
        assert chat.wait() == 0
        assert "Error" not in chat.seen
        assert chat.modes_are_restored()


def test_answers_are_stopped_and_a_full_context_is_said_in_words() -> None:
    # So hot that the model never comes to an end.
    flags = ["--temperature", "100", "--max-new-tokens", "5000", "--max-seq-len", "300"]
    flags += ["--on-full", "stop"]
    with AtTerminal([*torchrun(2), *CHAT, *flags]) as chat:
        chat.wait_for(">>> ")
        chat.type("Tell me a story.\r")
        chat.wait_for(">>> Tell me a story.\n")
        chat.type("never\ra\tline\r")  # typed ahead
        chat.type("\x03/stats\r")
        shown = chat.wait_for("(stopped)\n\n>>> /stats\n")
        assert len(shown) < 2000
        assert "never" not in shown
        assert "last answer" in chat.wait_for("\ncache ")

        chat.type("/clear\r")
        chat.wait_for("(a new conversation)\n>>> ")
        chat.type("1 " * 140 + "\r")
        chat.wait_for("(the context of 300 tokens is full; /clear begins a new conversation)")
        chat.type("And now?\r")
        chat.wait_for("(not sent: the conversation with it has ")
        chat.type("/clear\r")
        chat.wait_for("(a new conversation)\n>>> ")
        chat.type("Go on.\r")
        chat.wait_for("Go on.\n")

        ranks = ranks_of(chat.process.pid).values()
        chat.process.kill()  # in the middle of an answer, and torchrun itself: it can end nobody
        chat.wait()
        assert chat.modes_are_restored()
        assert all(is_gone(rank) for rank in ranks)


def test_without_a_terminal_lines_go_in_and_answers_out() -> None:
    lines = "My name is Anna.\n\nWhat is my \xe9\xff name?\n/foo\nWhat is my name?"
    done = run([*ALONE, *CHAT], lines)
    assert done.returncode == 0
    answers = done.stdout.splitlines()
    assert (answers[0], answers[-1], len(answers)) == ("Noted.", "Your name is Anna.", 3)
    assert done.stderr.endswith("(/foo is not a command; /help lists them)\n")
