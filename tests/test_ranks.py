"""A rank that waits for others: a signal ends the wait, and the ranks that are missing are named."""
import os
import signal
import socket
import sys

import pytest
import torch.distributed as dist

from models.parts import ranks
from tests.running import SERVER

# In the way of the test's clock only: what a user waits for are the constants.
SOON = {"TELL_SECONDS": 0.3, "LEAVE_SECONDS": 0.1, "LOOK_SECONDS": 0.01}


def leave(number, frame):  # as train.py does before the first step
    sys.exit(128 + number)


def child(rank, port, says, absent, patient, longest):
    """One of two ranks, of which one does not come. says: a connection that is open as long as it lives."""
    os.dup2(says.fileno(), 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    vars(ranks).update(SOON)
    signal.signal(signal.SIGTERM, leave)
    ranks.others.meet(rank, 2, "gloo")
    signal.signal(signal.SIGTERM, lambda *_: None)  # as it does from then on: the step is finished first
    print("all are here", file=sys.stderr, flush=True)
    while rank == absent:
        signal.pause()
    ranks.others.longest = longest
    with ranks.others.waiting(patient):
        dist.barrier()


STARTED = []


def late(number, frame):
    raise AssertionError("it hangs")


@pytest.fixture(autouse=True)
def none_is_left():
    """Also of a test that fails: they hear no signal then, and pytest would wait for them."""
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(90)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    while STARTED:
        STARTED.pop().kill()


class Rank:
    def __init__(self, number, port, absent=1, patient=False, longest=0.0):
        heard, says = SERVER.Pipe(duplex=False)
        self.process = SERVER.Process(target=child, args=(number, port, says, absent, patient, longest), daemon=True)
        self.process.start()
        says.close()
        self.lines = open(os.dup(heard.fileno()), encoding="utf-8")
        STARTED.append(self.process)

    def until(self, words):
        """Read what it says up to a line with these words."""
        for line in self.lines:
            if words in line:
                return line
        raise AssertionError(f"it ended without saying {words!r}")

    def stop(self):
        """Ask it to stop, and wait for its exit code."""
        os.kill(self.process.pid, signal.SIGTERM)
        self.process.join(30)
        return self.process.exitcode


@pytest.fixture
def port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize("alone", [0, 1])
def test_a_rank_that_nobody_meets_names_the_other_and_hears_a_signal(port, alone):
    rank = Rank(alone, port)
    assert f"rank {alone} has waited" in rank.until(f"for rank {1 - alone}")
    assert rank.stop() == 143


def test_a_rank_in_the_middle_of_a_sum_names_the_other_and_hears_a_signal(port):
    one, other = Rank(0, port), Rank(1, port)
    one.until("all are here")
    assert "rank 0 has waited" in one.until("for rank 1")
    assert one.stop() == 143 and "asked to stop while it waited for rank 1" in one.lines.read()


def test_a_rank_whose_store_hangs_hears_a_signal(port):
    one, other = Rank(1, port, absent=0), Rank(0, port, absent=0)
    one.until("all are here")
    os.kill(other.process.pid, signal.SIGSTOP)
    assert one.stop() == 143


@pytest.mark.parametrize("patient, longest", [(True, 0.0), (False, 3600.0)])
def test_a_signal_does_not_end_a_wait_after_which_the_run_is_saved(port, patient, longest):
    one, other = Rank(0, port, 1, patient, longest), Rank(1, port)
    one.until("all are here")
    os.kill(one.process.pid, signal.SIGTERM)
    assert "has waited" in one.until("for rank 1")  # three times as long as it takes to leave


def test_five_seconds_are_kept():
    assert ranks.LOOK_SECONDS + ranks.LEAVE_SECONDS + ranks.ANSWER_SECONDS < 5 and ranks.TELL_SECONDS == 120
