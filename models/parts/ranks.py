"""Where the ranks of a run wait for each other: a signal ends such a wait, and who is missing is said.

    others.meet(rank, world, "gloo")        # the processes that torchrun has started
    with others.waiting():
        dist.all_reduce(sums)

The call inside is one of C++, in which Python hears no signal and which says nothing. So a thread beside it
looks at the clock. Without torchrun there is nobody to wait for, and no thread.
"""
import contextlib
import os
import select
import signal
import socket
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from models.parts import Invalid
from models.parts.plain import say

LIMIT = timedelta(minutes=30)  # the others wait while rank 0 saves or speaks, on a slow disk for long
TELL_SECONDS = 120  # of waiting, after which the missing ranks are named: a slow disk takes as long
LEAVE_SECONDS = 3.0  # from a signal to the end of a wait; with what comes after it 5 are promised
LOOK_SECONDS = 0.5  # between two looks at the clock
ANSWER_SECONDS = 1.0  # for the store to say who waits; without an answer its host is missing
ENDING = {signal.SIGINT, signal.SIGTERM}


class Others:
    """The other ranks, as this one sees them."""

    def __init__(self):
        self.rank, self.world = 0, 1
        self.store = None  # through it ranks exchange words, also when one of them has failed
        self.number = 0  # of waits so far; all ranks count alike
        self.since = None  # when the present wait began
        self.longest = 0.0  # wait so far, in seconds
        self.patient = False

    def meet(self, rank, world, backend):
        """Find the other ranks. Until all are there this waits, as for any sum."""
        self.rank, self.world = rank, world
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise Invalid(f"RANK is set and {missing[0]} is not: start it by torchrun, or unset RANK")
        heard, told = socket.socketpair()
        told.setblocking(False)
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, args=(heard, told), daemon=True).start()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        how = {"timeout": LIMIT, "wait_for_workers": False, "multi_tenant": True}
        with self.waiting():
            store = dist.TCPStore(address, port, world, hosts, **how)
            words = dist.TCPStore(address, port, world, False, **how)  # the group keeps its own busy
            prefix = attempt()  # without it the addresses of the dead still stand there
            self.store = dist.PrefixStore(prefix, words)
            places = {"rank": rank, "world_size": world, "timeout": LIMIT}
            dist.init_process_group(backend, store=dist.PrefixStore(prefix, store), **places)

    def part(self):
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def waiting(self, patient=False):
        """Around a call that ends when all ranks have made it. patient: rank 0 works meanwhile, and ends it
        by itself after a signal."""
        self.number += 1
        self.patient = patient
        self.since = time.monotonic()
        yield
        if dist.is_initialized() and dist.get_backend() == "nccl":  # the call has come back at once
            torch.cuda.synchronize()
        self.longest = max(self.longest, time.monotonic() - self.since)
        self.since = None

    # ---- beside the wait

    def watch(self, heard, _):
        """What the thread does. heard: a socket that gets the number of each signal as it comes."""
        caught, asked = 0, 0.0
        announced = told = 0  # numbers of waits
        while True:
            if select.select([heard], [], [], LOOK_SECONDS)[0]:
                number = heard.recv(1)[0]
                if number in ENDING and not caught:
                    caught, asked = number, time.monotonic()
            since, number, now = self.since, self.number, time.monotonic()
            if since is None:
                continue
            if self.store and announced != number:
                announced = number
                threading.Thread(target=self.announce, args=(number,), daemon=True).start()
            # In a step the others may come as late as they came before, and then the step is saved.
            patience = max(LEAVE_SECONDS, 2 * self.longest)
            if caught and not self.patient and now - max(since, asked) > patience:
                self.tell("was asked to stop while it waited for", number)
                os._exit(128 + caught)
            if now - since > TELL_SECONDS and told != number:
                told = number
                self.tell(f"has waited for {now - since:.0f} s, and goes on waiting, for", number)

    def announce(self, number):
        """In a thread of its own, as all that asks the store: its host may be the rank that hangs."""
        with contextlib.suppress(RuntimeError):  # the host has ended, as the sum itself will say
            self.store.set(f"waits {self.rank}", str(number))

    def tell(self, text, number):
        """A line with the missing ranks, from the lowest of those that wait."""
        late = self.missing(number)
        waiting = [rank for rank in range(self.world) if rank not in late]
        if self.rank == min(waiting):
            names = ", ".join(f"rank {rank}" for rank in late)
            say(f"rank {self.rank} {text} {names or 'all others'}")

    def missing(self, number):
        """The ranks that do not wait as this one does."""
        late = [0]  # through which all of them meet: without its answer it is the one

        def ask():
            with contextlib.suppress(RuntimeError):
                late[:] = [rank for rank in range(self.world) if not self.is_waiting(rank, number)]

        if self.store:
            asking = threading.Thread(target=ask, daemon=True)
            asking.start()
            asking.join(ANSWER_SECONDS)
        return list(late)

    def is_waiting(self, rank, number):
        key = f"waits {rank}"
        return rank == self.rank or self.store.check([key]) and int(self.store.get(key)) == number


def attempt() -> str:
    """torchrun restarts all ranks when one has died; "0" is the first time."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


others = Others()
