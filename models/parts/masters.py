"""What an optimizer steps on in one process, and the sum of gradients over several.

    trained parameters --copies where they are bf16--> Masters --step--> publish --> the model's own again

shards.py has the same calls for masters that are shared out over the ranks.
"""
import contextlib
from functools import partial

import torch
import torch.distributed as dist

from models.parts.lean import Bare, InBackward, padded
from models.parts.ranks import others


class Masters:
    """What the optimizer steps on: the trained parameters, or float32 copies of those that are kept in bf16.

    bf16 has three digits, so most steps would be rounded away. Gradients of a bf16 parameter are added up in
    its copy as backward makes them, so that accumulation is float32 too. With `master` "none" there are no
    copies, only places where gradients are added up: Lean then rounds its steps at random.
    """

    def __init__(self, named, master="float32"):
        self.named, self.copies = named, {}
        self.fused = None
        places = 0
        for name, p in named.items():
            if p.dtype != torch.float32:
                copy = Bare(p)
                if master != "none":
                    copy = torch.nn.Parameter(p.detach().float())
                p.register_post_accumulate_grad_hook(partial(self._move, copy))
                self.copies[name] = copy
            self.copies.get(name, p).start = places
            places += padded(p.numel())
        self.parameters = [self.copies.get(name, p) for name, p in named.items()]
        # Whether the files of the model hold all that there is.
        self.exact = master == "none" or not self.copies

    @staticmethod
    def _move(copy, p):
        """After each backward: nothing may pile up in bf16."""
        if copy.grad is not None:
            copy.grad = copy.grad.float().add_(p.grad)
        else:
            copy.grad = p.grad if isinstance(copy, Bare) else p.grad.float()
        p.grad = None

    def step_in_backward(self, optimizer):
        """From now on backward steps each parameter, and forgets its gradient."""
        self.fused = InBackward(optimizer)
        for p, master in zip(self.named.values(), self.parameters):
            self.fused.follow(p, master)

    def backward(self, loss):
        """Add the gradients of a micro-batch, or take the step, which a loss that is not finite must not."""
        if self.fused is None or loss.isfinite():
            loss.backward()

    def reduce(self):
        """Sum the gradients over ranks. All ranks."""
        reduce_gradients(self.parameters)

    def norm(self):
        """The length of all gradients as one vector; not finite if any value is not."""
        return self.fused.norm() if self.fused else gradient_norm(self.parameters)

    @torch.no_grad()
    def publish(self):
        """Round the copies into the parameters that the model computes with."""
        if self.exact:
            return
        for name, copy in self.copies.items():
            self.named[name].copy_(copy)

    def values(self):
        return {name: p.data.cpu() for name, p in zip(self.named, self.parameters)}

    def set(self, values):
        """Take values {name: tensor} of all parameters."""
        for value, parameter in zip(values.values(), self.parameters):
            parameter.data.copy_(value)
        self.publish()

    def state(self, optimizer):
        return optimizer.state_dict()

    def load_state(self, optimizer, saved):
        """The settings of the optimizer stay its own: another kind of step may have saved the state."""
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({**saved, "param_groups": groups})


class Average:
    """A float32 mean of the trained values over the steps in which older ones count ever less (`ema`).

    It is validated and saved; training itself knows nothing of it. Without a decay it is empty.
    """

    def __init__(self, masters, decay):
        self.masters, self.decay = masters, decay
        self.values = [p.detach().clone() for p in masters.parameters] if decay else []

    @torch.no_grad()
    def update(self, step):
        """After the step of that number, from 1 on."""
        if not self.values:
            return
        # The first mean is the base. With the full decay at once, a short run would hardly leave it.
        decay = min(self.decay, step / (step + 9))
        torch._foreach_lerp_(self.values, self.masters.parameters, 1 - decay)

    @contextlib.contextmanager
    def acting(self):
        """Within, the model computes with the mean."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self):
        for value, p in zip(self.values, self.masters.parameters):
            held = p.clone()
            p.copy_(value)
            value.copy_(held)
        if self.values:
            self.masters.publish()

    def restore(self, values):
        for value, saved in zip(self.values, values, strict=True):
            value.copy_(saved)


BUCKET = 64 * 2**20  # values that are sent at once, 256 MB: enough to hide latency, little beside the model


def reduce_gradients(parameters, bucket=BUCKET):
    """Sum gradients over ranks, in flat float32 buckets; a missing gradient counts as zeros. All ranks.

    Once per step, after all micro-batches. They are sums and not means: the counts were those of all ranks.
    """
    if not dist.is_initialized():
        return
    waiting, size = [], 0
    for p in parameters:
        # A part of the model that no clip of this rank needs has a gradient on other ranks only.
        if p.grad is None:
            p.grad = torch.zeros_like(p.data)
        if waiting and size + p.data.numel() > bucket:
            reduce_together(waiting)
            waiting, size = [], 0
        waiting.append(p)
        size += p.data.numel()
    reduce_together(waiting)


def reduce_together(parameters):
    """One message for many tensors: most adapters are so small that latency would be all."""
    flat = torch.cat([p.grad.flatten().float() for p in parameters])
    with others.waiting():
        dist.all_reduce(flat)
    parts = flat.split([p.data.numel() for p in parameters])
    for p, part in zip(parameters, parts):
        p.grad = part.view_as(p.data)


def gradients(parameters):
    """Those there are: a frozen loss weight or an unused part leaves some parameters without."""
    return [p.grad for p in parameters if p.grad is not None]


def gradient_norm(parameters):
    """The length of all gradients as one vector; not finite if any value is not."""
    norms = torch._foreach_norm(gradients(parameters))
    return torch.linalg.vector_norm(torch.stack(norms))


def cut(parameters, norm, longest):
    """Scale the gradients down to the norm `longest`; 0 is none."""
    if longest and norm > longest:
        torch._foreach_mul_(gradients(parameters), longest / (norm + 1e-6))
