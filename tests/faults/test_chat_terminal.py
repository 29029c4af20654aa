"""The chat under torchrun at a terminal: typing, Ctrl-C, Ctrl-D, idling, dying."""

import json
import os
import re
import signal
import stat
import time
from pathlib import Path

import pytest

from tests.programs import ALONE, GENERATE, HANG_SECONDS, AtTerminal, ranks_of, run, torchrun

CHAT = [GENERATE, "--interactive"]
AS_GENERATE = f"""
import runpy, sys
sys.argv[0] = {GENERATE!r}
sys.path.insert(0, {str(Path(GENERATE).parent)!r})  # as Python does for a program
runpy.run_path({GENERATE!r}, run_name="__main__")
"""
# A wait of more than a second that is not announced to the watchdog fails the test.
IMPATIENT = f"""
import datetime
from torch.distributed import distributed_c10d
distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=1)
{AS_GENERATE}
"""
LEAVES = "/help lists the commands, Ctrl-D leaves)\n>>> "
RIGHT, UP = "\x1b[C", "\x1b[A"
PASTE = "\x1b[200~{}\x1b[201~"


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
        chat.wait_for(LEAVES)
        chat.type("y nme is Anna.\x01M" + 3 * RIGHT + "a\r")  # Ctrl-A
        chat.wait_for(">>> My name is Anna.\nNoted.\n\n>>> ")

        ranks = ranks_of(chat.process.pid)
        assert sorted(ranks) == [0, 1]
        before = sum(map(cpu_seconds, ranks.values()))
        time.sleep(4)  # idle, for longer than an impatient world and its watch allow
        assert sum(map(cpu_seconds, ranks.values())) - before < 1.0
        chat.type("\x1b[200~What is\rmy name?\x1b[201~")  # pasted
        chat.wait_for("    my name?")
        chat.type("\x15What is my name?\r/st")  # the last of it typed ahead
        chat.wait_for("Your name is Anna.\n\n>>> /st")

        chat.type("ats\r")
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
        chat.process.kill()  # in an answer; torchrun, too, so it cannot end ranks
        chat.wait()
        assert chat.modes_are_restored()
        assert all(is_gone(rank) for rank in ranks)


def test_text_reaches_the_model_as_it_was_pasted_and_the_next_chat_remembers_it(
    tmp_path: Path,
) -> None:
    home, file = str(tmp_path / "a" / "state"), tmp_path / "a" / "state" / "dsv3" / "chat_history"
    pasted = "\tall:\n\t\tgcc  a.c  \n\n    胡e\u0301👩‍👧 \x01\n"
    long = "long " * 20_000
    with AtTerminal([*ALONE, *CHAT, "--max-seq-len", "4096"], XDG_STATE_HOME=home) as chat:
        chat.wait_for(LEAVES)
        chat.type(PASTE.format(pasted) + "\r")
        chat.wait_for("    胡e\u0301👩‍👧 ^A\n")
        chat.wait_for("\n>>> ")
        chat.type("  a\tb\x1b\rc\r")  # not marked as pasted; Alt-Enter
        chat.wait_for(">>>   a     b\n    c\n")
        chat.wait_for("\n>>> ")
        chat.type('"""\ra\r  b"""\r\r"""\r')
        chat.wait_for("\n>>> ")
        for text in (long, PASTE.format(long)):
            chat.type(text + "\r")
            chat.wait_for("(not sent: it has ")
            chat.wait_for(")\n>>> ")
        chat.type("/clear\r/exit\r")
        assert chat.wait() == 0
        assert chat.modes_are_restored()
    messages = [json.loads(line) for line in file.read_text().splitlines()]
    block = '"""\na\n  b"""\n\n"""'
    assert messages == [pasted, "  a\tb\nc", block, "/clear", "/exit"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with AtTerminal([*ALONE, *CHAT], XDG_STATE_HOME=home) as chat:
        chat.wait_for(LEAVES)
        chat.type(UP * 3)
        chat.wait_for('>>> """\n    a\n      b"""\n \n    """')
        chat.type("\x15" + UP + "\x15/stats\r")
        chat.wait_for("(no answers yet)\n>>> ")
        chat.type("\x04")
        assert chat.wait() == 0
    assert len(file.read_text().splitlines()) == 6


def test_a_narrower_screen_shows_the_message_once() -> None:
    with AtTerminal([*ALONE, *CHAT, "--no-history"]) as chat:
        chat.wait_for(LEAVES)
        chat.type("a" * 100)
        chat.wait_for("a" * 24)
        drawn = len(chat.raw)
        chat.resize(30)
        chat.type("b")
        chat.wait_for("aab")
        # The 80 columns of the first row have become 3 rows; the cursor was in the row after.
        erased = chat.raw[drawn:].split("\x1b[J")[0]
        assert sum(int(rows or 1) for rows in re.findall(r"\x1b\[(\d*)A", erased)) == 3
        chat.type("\x03")
        chat.wait_for("^C\n>>> ")


@pytest.mark.parametrize("is_answering", [False, True])
def test_a_rank_that_dies_ends_the_chat(is_answering: bool) -> None:
    flags = ["--temperature", "100", "--max-new-tokens", "5000"]
    with AtTerminal([*torchrun(2), *CHAT, *flags]) as chat:
        chat.wait_for(LEAVES)
        if is_answering:
            chat.type("Go on.\r")
            chat.wait_for("Go on.\n")
        ranks = ranks_of(chat.process.pid)
        os.kill(ranks[1], signal.SIGKILL)
        chat.wait_for("error: rank 1")
        assert chat.wait() == 1  # torchrun's
        assert "Traceback" not in chat.seen.split("error: rank 1")[0]
        assert all(map(is_gone, ranks.values()))
        assert chat.modes_are_restored()


def test_a_signal_at_the_prompt_ends_the_chat_in_order() -> None:
    with AtTerminal([*ALONE, *CHAT]) as chat:
        chat.wait_for(LEAVES)
        chat.type("half a li")
        chat.wait_for("half a li")
        chat.process.terminate()
        assert chat.wait() == 128 + signal.SIGTERM
        assert chat.seen.endswith(">>> half a li\nstopped\n")
        assert chat.modes_are_restored()


def test_without_an_editor_the_terminal_gives_lines(tmp_path: Path) -> None:
    program = tmp_path / "plain.py"
    program.write_text(f"import sys\nsys.modules['prompt_toolkit'] = None\n{AS_GENERATE}")
    with AtTerminal([*ALONE, str(program), "--interactive"]) as chat:
        assert "(plain lines" in chat.wait_for("pip install prompt_toolkit brings a line editor)\n")
        chat.wait_for(">>> ")
        chat.type('"""\nMy name is\n Anna.\n"""\n')
        chat.wait_for("Noted.\n")
        chat.type("/help\n")
        chat.wait_for("Ctrl-C ends the program.\n>>> ")
        chat.type("\x04")
        assert chat.wait() == 0


def test_without_a_terminal_lines_go_in_and_answers_out() -> None:
    lines = "My name is Anna.\n\nWhat is my \xe9\xff name?\n/foo\nWhat is my name?"
    done = run([*ALONE, *CHAT], lines)
    assert done.returncode == 0
    answers = done.stdout.splitlines()
    assert (answers[0], answers[-1], len(answers)) == ("Noted.", "Your name is Anna.", 3)
    assert done.stderr.endswith("(/foo is not a command; /help lists them)\n")
