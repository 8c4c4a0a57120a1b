"""A peer and bench.py in turns on one machine, and the ratio of the two: what the scripts beside this file
share.

The flags are those of bench.py and mean the same. Each run is a process of its own, so that neither the
memory nor the caches of one reach the other, and the two alternate, so that a machine that slows down slows
both.
"""
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import bench
import configs
import models
from configs import opt

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
COLUMNS = ("step_ms_median", "step_cpu_ms_median", "peak_mem_mib")


@dataclass
class Turns(bench.Bench):
    """Measure a peer and bench.py in turns: a JSON line of each run, at the end medians and their ratio."""

    batch: int = opt(8, "clips or requests at once")
    rounds: int = opt(3, "how often each of the two runs; the medians of these runs are compared")
    as_used: bool = opt(False, "training as the peer's own recipes have it, with the codec inside of the step")
    venv: str = opt("", "folder of the peer's environment, made and filled where it is missing; empty takes this Python")
    alone: bool = opt(False, "measure the peer only, in this process; what the rounds start")


class Peer(NamedTuple):
    """What a peer's script hands to `compare`."""

    backbone: str
    script: str  # its name as a module
    build: Callable  # (cfg, device, dtype) -> the step to measure
    requirements: str  # the file that lists what it needs
    bare: tuple = ()  # packages that go in behind those, without what they ask for


def interpreter(folder, requirements, bare):
    """The Python of an environment, which is made if need be from a requirements file, and `bare` behind it."""
    if not folder:
        return sys.executable
    python = Path(folder) / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
        install = [python, "-m", "pip", "install", "-q"]
        subprocess.run([*install, "-r", HERE / requirements], check=True)
        if bare:
            subprocess.run([*install, "--no-deps", *bare], check=True)
    return str(python)


def flags(cfg):
    """The flags of bench.py that give the same measurement."""
    out = []
    for field in dataclasses.fields(bench.Bench):
        value = getattr(cfg, field.name)
        if isinstance(value, dict):
            out += [f"--{field.name}.{key}={entry}" for key, entry in value.items()]
        elif isinstance(value, list):
            out += [f"--{field.name}={','.join(map(str, value))}"] if value else []
        else:
            out.append(f"--{field.name}={value}")
    return out


def run(command):
    """What a process measured: the last line that it printed."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}: exit code {done.returncode}")
    line = done.stdout.splitlines()[-1]
    print(line, flush=True)
    return json.loads(line)


def ratio(peer, here):
    """Medians over the rounds of both, and how many times as long the peer takes: by the clock, and in time of
    the CPU, which is the steadier figure where other programs run (with --threads 1)."""
    out = {}
    for name, runs in (("peer", peer), ("here", here)):
        for column in COLUMNS:
            out[f"{name}_{column}"] = round(statistics.median(r[column] for r in runs), 1)
    out["ratio"] = round(out["peer_step_ms_median"] / out["here_step_ms_median"], 2)
    out["cpu_ratio"] = round(out["peer_step_cpu_ms_median"] / out["here_step_cpu_ms_median"], 2)
    return out


def alone(cfg, peer):
    """Measure the peer in this process and print it."""
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(cfg.seed)
    device = models.pick_device(cfg.device)
    step = peer.build(cfg, device, models.pick_dtype(cfg.dtype, device))
    print(json.dumps({"peer": peer.script, "as_used": cfg.as_used, **bench.measure(cfg, step, device)}))


def compare(peer):
    """The main of a peer's script."""
    cfg = configs.parse(Turns, script="bench")
    cfg.backbone = peer.backbone
    bench.check(cfg)
    if cfg.alone:
        alone(cfg, peer)
        return
    python = interpreter(cfg.venv, peer.requirements, peer.bare)
    command_there = [python, "-m", peer.script, "--alone", f"--as_used={cfg.as_used}", *flags(cfg)]
    command_here = [sys.executable, str(ROOT / "bench.py"), *flags(cfg)]
    there, here = [], []
    for _ in range(cfg.rounds):
        there.append(run(command_there))
        here.append(run(command_here))
    print(json.dumps(ratio(there, here)))


def clips(cfg):
    """[(seconds, text tokens)] of the rows of a batch, as bench.py cycles them."""
    given = cfg.lengths or [cfg.seconds]
    seconds = [given[i % len(given)] for i in range(cfg.batch)]
    return [(s, cfg.text or max(4, int(3 * s))) for s in seconds]


def training(parameters, loss, device):
    """A step like bench.py's: forward, backward, clipping, AdamW. loss() is that of one batch, always the same."""
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, 1e-4, weight_decay=0.01, fused=device.type == "cuda")

    def step():
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

    return step
