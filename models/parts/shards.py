"""Optimizer state shared out over ranks (ZeRO, arXiv 1910.02054): each keeps its share of moments and copies.

    bucket   | weight a ....... | weight b .. |0| weight c ........... |0|   flat, float32, up to 64M values
    of rank  |       0       |       1       |       2       |     3     |

A gradient goes into its bucket as backward makes it; a bucket that is full is summed over ranks, each of
which keeps its slice of the sum. The optimizer steps on the slices; then weights are gathered bucket by
bucket. So a rank has the whole model, and 16 bytes per trained weight (10 where moments have 8 bits) divided
by the ranks.

What is saved is put together tensor by tensor, as if one rank had trained: any number of ranks goes on.
"""
from functools import partial

import torch
import torch.distributed as dist

from models.parts.lean import BLOCK, padded
from models.parts.ranks import others

BUCKET = 64 * 2**20  # values sent at once, 256 MB: enough to hide latency, little beside a model
# Their names from torch 2.13 on, and those before.
scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Bucket:
    """Some trained parameters in a row, of which this rank keeps one slice."""

    def __init__(self, named, start):
        """start: place of the bucket in the model, as models/parts/lean.py counts places."""
        self.named, self.begins = named, {}
        size = 0
        for name, p in named.items():
            self.begins[name] = size
            size += padded(p.numel())
        self.end = start + size
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.share = padded(-(-size // ranks))
        self.kept = slice(rank * self.share, (rank + 1) * self.share)
        device = next(iter(named.values())).device
        self.slice = torch.nn.Parameter(torch.zeros(self.share, device=device))
        self.slice.start = start + self.kept.start
        # What all its weights are rounded to is rounded before it is sent.
        dtypes = {p.dtype for p in named.values()}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        self.flat, self.waiting = None, set(named)

    def fresh(self, like, blocks=1):
        """Zeros for the whole bucket, one for so many places."""
        size = self.share * dist.get_world_size() // blocks
        return torch.zeros(size, dtype=like.dtype, device=like.device)

    def where(self, name, blocks=1):
        """The places of a parameter: whole blocks, the last one filled up with zeros."""
        begin = self.begins[name]
        end = begin + padded(self.named[name].numel())
        return slice(begin // blocks, end // blocks)

    def own(self, tensors, blocks=1):
        """This rank's slice of what {name: tensor} says of the parameters."""
        first = next(iter(tensors.values()))
        flat = self.fresh(first, blocks)
        for name, tensor in tensors.items():
            place = flat[self.where(name, blocks)]
            place[: tensor.numel()] = tensor.flatten()
        begin, end = self.kept.start // blocks, self.kept.stop // blocks
        return flat[begin:end].clone()

    def state(self, key, tensors):
        """This rank's part of an optimizer's state, of which {name: tensor} is saved."""
        if key == "step":
            return next(iter(tensors.values())).clone()
        return self.own(tensors, BLOCK if key.endswith("_scale") else 1)

    def shaped(self, name, flat):
        """A parameter's values in a flat tensor, in its own shape."""
        p = self.named[name]
        values = flat[self.where(name)]
        return values[: p.numel()].view(p.shape)

    def whole(self, mine):
        """The slices of all ranks, joined. All ranks."""
        flat = torch.empty(len(mine) * dist.get_world_size(), dtype=mine.dtype, device=mine.device)
        with others.waiting():
            gather(flat, mine.contiguous())
        return flat


class Shards:
    """In place of train.py's Masters, with the same calls. All ranks make all of them."""

    def __init__(self, named, say, bucket=BUCKET):
        self.named, self.buckets = named, []
        members, size, start = {}, 0, 0
        for name, p in named.items():
            if members and size + p.numel() > bucket:
                self.buckets.append(Bucket(members, start))
                members, size, start = {}, 0, self.buckets[-1].end
            members[name] = p
            size += p.numel()
        self.buckets.append(Bucket(members, start))
        self.parameters = [bucket.slice for bucket in self.buckets]
        self.exact = all(p.dtype == torch.float32 for p in named.values())
        self.saves = dist.get_rank() == 0
        for bucket in self.buckets:
            for name, p in bucket.named.items():
                p.register_post_accumulate_grad_hook(partial(self._take, bucket, name))
        self._cut(named)
        self.queue = []
        self.scatters = can_scatter(self.parameters[0].device)
        if not self.scatters:
            say("this backend has no reduce_scatter: gradients are summed whole, and cut then")

    # ------------------------------------------------------------------------------------------- gradients

    def backward(self, loss):
        """Add the gradients of a micro-batch, summed over ranks, to the slices."""
        # Backward comes from the last layer to the first. All ranks send in this order, whatever is missing
        # on some of them.
        self.queue = list(reversed(self.buckets))
        loss.backward()
        while self.queue:
            self._send(self.queue.pop(0))

    def _take(self, bucket, name, p):
        """After the gradient of a parameter is complete."""
        if bucket.flat is None:
            bucket.flat = bucket.fresh(bucket.slice)
        place = bucket.flat[bucket.where(name)]
        place[: p.numel()] = p.grad.flatten()
        p.grad = None
        bucket.waiting.discard(name)
        while self.queue and not self.queue[0].waiting:
            self._send(self.queue.pop(0))

    def _send(self, bucket):
        flat = bucket.flat
        if flat is None:
            flat = bucket.fresh(bucket.slice)
        bucket.flat = None
        bucket.waiting = set(bucket.named)
        if self.scatters:
            mine = torch.empty_like(bucket.slice.data)
            scatter(mine, flat)
        else:
            dist.all_reduce(flat)
            mine = flat[bucket.kept].clone()
        p = bucket.slice
        p.grad = mine if p.grad is None else p.grad.add_(mine)

    def reduce(self):
        """Nothing is left to sum: `backward` has."""

    def norm(self):
        """The length of all gradients as one vector."""
        norms = torch.stack(torch._foreach_norm([p.grad for p in self.parameters]))
        square = norms.square().sum()
        with others.waiting():
            dist.all_reduce(square)
        return square.sqrt()

    # --------------------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def publish(self):
        """Give every rank the weights that the optimizer has moved, rounded to the model's dtype."""
        for bucket in self.buckets:
            flat = bucket.whole(bucket.slice.to(bucket.dtype))
            for name, p in bucket.named.items():
                p.copy_(bucket.shaped(name, flat))

    def set(self, values):
        """Take values {name: tensor} of all parameters, which are the same on all ranks."""
        self._cut(values)
        self.publish()

    @torch.no_grad()
    def _cut(self, values):
        for bucket in self.buckets:
            inside = {name: values[name].float() for name in bucket.named}
            bucket.slice.copy_(bucket.own(inside))

    # ------------------------------------------------------------------------------------------ checkpoints

    def values(self):
        """{name: float32 tensor on the CPU} of all parameters, on rank 0; elsewhere nothing."""
        out = {}
        for bucket in self.buckets:
            flat = bucket.whole(bucket.slice.detach())
            if self.saves:
                out |= {name: bucket.shaped(name, flat).cpu() for name in bucket.named}
        return out

    def state(self, optimizer):
        """The optimizer's state_dict as one rank would have it, on rank 0."""
        numbers = {name: i for i, name in enumerate(self.named)}
        states = {i: {} for i in range(len(numbers))}
        for bucket in self.buckets:
            for key, mine in optimizer.state.get(bucket.slice, {}).items():
                values = self._collect(bucket, key, mine)
                for name, value in values.items():
                    states[numbers[name]][key] = value
        states = {i: state for i, state in states.items() if state}
        group = optimizer.state_dict()["param_groups"][0]
        group["params"] = list(numbers.values())
        return {"state": states, "param_groups": [group]}

    def _collect(self, bucket, key, mine):
        """{name: this part of its state, on the CPU}, on rank 0."""
        if key == "step":  # each its own: an optimizer counts it up in place
            return {name: mine.cpu().clone() for name in bucket.named}
        blocks = bucket.share // len(mine)
        flat = bucket.whole(mine)
        if not self.saves:
            return {}
        out = {}
        for name in bucket.named:
            value = flat[bucket.where(name, blocks)]
            if mine.dtype == torch.float32 and blocks == 1:
                value = bucket.shaped(name, flat)
            out[name] = value.cpu()
        return out

    def load_state(self, optimizer, saved):
        """The counterpart, on any number of ranks."""
        states = {}
        for number, bucket in enumerate(self.buckets):
            by_key = {}  # {"exp_avg": {name: tensor}, ..}
            for i, name in enumerate(self.named):
                state = saved["state"].get(i, {}) if name in bucket.named else {}
                for key, value in state.items():
                    by_key.setdefault(key, {})[name] = value
            states[number] = {key: bucket.state(key, values) for key, values in by_key.items()}
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": states, "param_groups": groups})


def can_scatter(device):
    """Whether sums over ranks can be shared out as they are made. All ranks."""
    ranks = dist.get_world_size()
    try:
        scatter(torch.zeros(1, device=device), torch.zeros(ranks, device=device))
    except RuntimeError:
        return False
    return True
