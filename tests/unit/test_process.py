"""Signal handlers of a program around its part in a job."""

import os
import signal
from collections.abc import Iterator

import pytest

from dsv3.distributed.watchdog import Watchdog
from dsv3.errors import Interrupted
from process import end_at_signals, raise_at_ctrl_c

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_between_steps_interrupts_at_once_and_later_ones_are_ignored(number: int) -> None:
    with pytest.raises(Interrupted) as raised, end_at_signals(Watchdog()):
        os.kill(os.getpid(), number)
    assert raised.value.exit_code == 128 + number
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 2


def test_a_signal_within_a_step_interrupts_at_its_end() -> None:
    watchdog = Watchdog()
    done = []

    def step() -> None:
        with end_at_signals(watchdog), watchdog.step():
            os.kill(os.getpid(), signal.SIGTERM)
            done.append(watchdog.end_signal)

    with pytest.raises(Interrupted):
        step()
    assert done == [signal.SIGTERM]


def test_handlers_are_restored_and_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with end_at_signals(Watchdog()):
        assert callable(signal.getsignal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.set_wakeup_fd(-1) == -1
    raise_at_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise_at_ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
