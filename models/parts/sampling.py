"""What speaking is made of whatever the backbone: prompts side by side, who goes on, further tries, growing
chunks.

A model's `_run(requests, s)` speaks like this:

    batch = LeftPadded(lengths, most_steps, device)   # lengths of the prompts
    speaking = Speaking(caps)                         # frames that each request may have at most
    ...                                               # the prompts, in the place batch.prompt()
    for n in range(max(caps)):
        ...                                           # frame n of all rows; ended: which of them it ends
        rows = speaking.after(n, ended)               # rows that go on; None: all do
        if not speaking.requests:
            break
        if rows is not None:
            batch.keep(rows)                          # and whatever else has a row for each request
        ...                                           # the frame goes in, in the place batch.step(n)
"""
from typing import NamedTuple

import torch


class Place(NamedTuple):
    """Where positions stand in a batch of rows that were padded on the left."""

    positions: torch.Tensor  # (B, 1, L) int64, counted from each row's own start; 0 in the padding
    # bool, which columns each position sees: (B, 1, L, L) of prompts, (B, 1, 1, S) of a step
    mask: torch.Tensor
    column: torch.Tensor  # (L,) int64, where their keys go in the caches


class LeftPadded:
    """Prompts of unequal length as one batch, padded on the left: all end, and go on, at the same column.

        column   0  1  2  3  4 | 5  6     prompts of 3 and 5 positions, then steps 0 and 1
        row 0    .  .  a  b  c | x  y     pad 2: a is position 0, x position 3
        row 1    d  e  f  g  h | x  y     pad 0

    width: columns L of the prompts; the caches need `columns` S in all.
    """

    def __init__(self, lengths, steps, device):
        """steps: how many columns to keep free behind the prompts."""
        self.width = max(lengths)
        self.columns = self.width + steps
        pad = torch.tensor([self.width - n for n in lengths])
        self.pad = pad.to(device)  # (B,)
        self.padded = min(lengths) < self.width
        self.numbers = torch.arange(self.columns, device=device)
        self.used = self.numbers[None] >= self.pad[:, None]  # (B, S): all columns but the padding

    def stack(self, rows):
        """(B, L, ...) of one (l, ...) CPU tensor for each prompt, zero in the padding."""
        out = torch.zeros(len(rows), self.width, *rows[0].shape[1:], dtype=rows[0].dtype)
        for b, row in enumerate(rows):
            out[b, self.width - len(row):] = row
        return out

    def prompt(self):
        """The place of the prompts: every position sees itself and what stands before it in its row."""
        column = self.numbers[: self.width]
        before = column[None] <= column[:, None]
        # a softmax over nothing would be NaN
        itself = torch.eye(self.width, dtype=torch.bool, device=column.device)
        mask = self.used[:, None, None, : self.width] & before | itself
        positions = (column[None] - self.pad[:, None]).clamp(min=0)[:, None]
        return Place(positions, mask, column)

    def step(self, n):
        """The place of the one position that step n (0, 1, ...) adds to every row."""
        column = self.numbers[self.width + n : self.width + n + 1]
        mask = (self.used & (self.numbers <= column))[:, None, None]
        positions = (column - self.pad)[:, None, None]
        return Place(positions, mask, column)

    def next(self, n):
        """The same for layer_steps: positions (B,), the number of the column, a mask or None.

        The mask tells of the columns up to there, (B, 1, 1, so many); None where no row was padded.
        """
        column = self.width + n
        mask = self.used[:, None, None, : column + 1] if self.padded else None
        return column - self.pad, column, mask

    def keep(self, rows):
        """Only these rows stay. rows: (R,) int64."""
        self.pad = self.pad[rows]
        self.used = self.used[rows]


class Speaking:
    """Who of a batch still speaks, and how the others ended."""

    def __init__(self, caps):
        """caps: frames that each request may have at most."""
        self.caps = caps
        self.requests = list(range(len(caps)))  # number of the request in each row of the batch
        self.finish = ["cap"] * len(caps)  # of every request: "end" by itself, or "cap"

    def after(self, n, ended):
        """Frame n (0, 1, ...) is made. ended: for each row whether it says that this was the end.

        Returns the rows that go on, None where all do.
        """
        going = []
        for row, request in enumerate(self.requests):
            if ended[row]:
                self.finish[request] = "end"
            elif n + 1 < self.caps[request]:
                going.append(row)
        if len(going) == len(self.requests):
            return None
        self.requests = [self.requests[row] for row in going]
        return going


def generator(seed):
    """torch.Generator of a seed; None: a seed that nobody knows."""
    g = torch.Generator()
    if seed is None:
        g.seed()
    else:
        g.manual_seed(seed)
    return g


def takes(model, requests, s, failed):
    """Yields (i, frame) of every request, as model._run does.

    s.retries times it runs again, with the next seed, for the requests of which failed(request, frames,
    finish) says so. The last take is kept; model.finish tells how each ended.
    """
    if not s.retries:  # frames come out while they are made
        yield from model._run(requests, s)
        return
    left = list(range(len(requests)))
    finish = ["cap"] * len(requests)
    for attempt in range(s.retries + 1):
        frames = {i: [] for i in left}
        tried = [reseeded(requests[i], attempt) for i in left]
        for row, frame in model._run(tried, s):
            frames[left[row]].append(frame)
        for row, i in enumerate(left):
            finish[i] = model.finish[row]
        again = []
        if attempt < s.retries:
            again = [i for i in left if failed(requests[i], frames[i], finish[i])]
        for i in left:
            if i not in again:
                yield from ((i, frame) for frame in frames[i])
        left = again
        if not left:
            break
    model.finish = finish


def reseeded(request, attempt):
    """The request with a seed for this attempt; without a seed, every attempt is another draw anyway."""
    if request["seed"] is None:
        return request
    return dict(request, seed=request["seed"] + attempt)


def chunks(frames, streams, join, most):
    """Audio (i, (n,)) of frames (i, frame): 1, 2, 4 .. `most` frames at a time, joined by `join`, through the
    codec stream of their request. What a codec's call costs is mostly fixed, but the first sound should come
    at once."""
    waiting = [[] for _ in streams]
    size = [1] * len(streams)
    for i, frame in frames:
        waiting[i].append(frame)
        if len(waiting[i]) >= size[i]:
            yield i, streams[i].decode(join(waiting[i])).cpu()
            waiting[i] = []
            size[i] = min(2 * size[i], most)
    for i, rest in enumerate(waiting):
        if rest:
            yield i, streams[i].decode(join(rest)).cpu()
