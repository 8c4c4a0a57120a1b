"""Scripts as a user starts them, each in a process of its own, without paying for `import torch` every time.

    run = start("train", [config, "--num_iters", 5], folder)    # a Run; run.wait() gives the exit code, run.said its output
    code, out, err = here("infer", ["--text", "Hi."])           # in this process, where the start of one is not the subject
    both = ranks(2, "train", [...], folder)                     # the environment of torchrun, two processes

One server imports the scripts and does nothing else; a run is a fork of it. What torchrun itself does is tested with torchrun.
"""
import contextlib
import importlib
import io
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import configs
import infer  # noqa: F401  (the server imports this file, so a run finds them all in memory)
import merge_lora  # noqa: F401
import prepare_data  # noqa: F401
import train  # noqa: F401
import validate  # noqa: F401
from models.parts import plain
from tests.conftest import ROOT

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.running", "torch.utils.tensorboard", "torch._dynamo", "pytest"])


class Run:
    """One process: `said` so far (stdout and stderr), `wait()` for the exit code, -9 when it was killed by signal 9."""

    def __init__(self, process, log):
        self.process, self.log = process, log

    @property
    def said(self):
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def pid(self):
        return self.process.pid

    def wait(self, seconds=120):
        self.process.join(seconds)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.said}")
        return code

    def until(self, condition, seconds=60):
        """Wait until condition(self) holds or the process has ended. Returns whether it holds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition(self):
                return True
            if self.process.exitcode is not None:
                return condition(self)
            time.sleep(0.002)
        return False


def _child(script, argv, log, cwd, env, hook):
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(cwd)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    if hook:
        hook()
    sys.argv = [f"{script}.py", *argv]
    configs.run(importlib.import_module(script).main)


def start(script, argv, cwd, env=None, hook=None):
    """A script in a new process; hook() is called in it first (a function of a test module, or a partial of one)."""
    os.environ["PYTHONPATH"] = str(ROOT)  # read by the server, which the first call starts
    logs = Path(cwd) / "said"
    logs.mkdir(exist_ok=True)
    log = logs / f"{len(list(logs.iterdir())):04d}.txt"
    log.touch()
    process = SERVER.Process(target=_child, args=(script, [str(a) for a in argv], str(log), str(cwd), env or {}, hook), daemon=True)
    process.start()
    return Run(process, log)


def free_locks():
    """Let go of the folders that scripts have locked in this process, which ends no sooner than all tests."""
    while plain.LOCKS:
        os.close(plain.LOCKS.pop())


def ranks(n, script, argv, cwd, hook=None):
    """The same script n times with the environment that torchrun gives to its processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(script, argv, cwd, {**common, "RANK": str(i), "LOCAL_RANK": str(i)}, hook) for i in range(n)]


def here(script, argv, encoding="utf-8"):
    """A script in this process: (exit code, stdout as bytes, stderr as text)."""
    out, err, before = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True), io.StringIO(), sys.argv
    sys.argv = [f"{script}.py", *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            configs.run(importlib.import_module(script).main)
        code = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.argv = before
    return code, out.buffer.getvalue(), err.getvalue()
