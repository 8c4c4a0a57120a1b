"""A look at the base before the first step: does it read the text, and is it better than no model at all?

No loss tells that by its size: 0.9 may be good for one checkpoint and 3.0 for another. So the first rows go
through the model with three variations, each row with the same draws, and only differences count:

    right      as they are
    shuffled   each recording with the text of another row: what reads the text finds that harder
    constant   all weights zero, so that every answer is the same: ln V for V codes, zero for latents

Data that are wrong in a way that no check of files can see (transcripts one row off, another language, a
wrong rate) show here in seconds, instead of in an hour.
"""
import copy
import math
import time
from dataclasses import dataclass, field

import torch

from models.parts.manifests import holders

ROWS = 32  # enough that chance seldom looks like a difference, few enough for seconds
LEAST_ROWS = 4  # of fewer no order of differences would be surprising
SECONDS = 20  # after these no further row is begun: on a CPU a row of a large model takes some
# Of Wilcoxon's signed-rank statistic in standard deviations: one shuffled data set in twenty passes.
SURE = 1.645
SEED = 1  # of the draws, which are the same for all three
READS_TEXT = "loss/text"  # how likely the text itself is; it says nothing of whether the recording fits
CAUSES = ("Usual causes: transcripts of other recordings, or one row off; another language or tokenizer than "
          "the base's; audio at a wrong rate or speed; a base that is not the published one.")


@dataclass
class Findings:
    """Losses of each row that was looked at, by kind; `wrong` says what they mean."""

    right: list[dict] = field(default_factory=list)  # {loss: mean} of each row
    shuffled: list[dict] = field(default_factory=list)
    constant: list[dict] = field(default_factory=list)
    weights: dict = field(default_factory=dict)
    alike: bool = False  # all rows have the same text
    seconds: float = 0.0

    def totals(self, kind):
        """One weighted loss for each row, of what depends on the recording."""
        weights = {name: weight for name, weight in self.weights.items() if name != READS_TEXT}
        return [sum(weights[name] * losses.get(name, 0.0) for name in weights) for losses in kind]

    @property
    def gains(self):
        """By how much the right text is better, for each row."""
        pairs = zip(self.totals(self.right), self.totals(self.shuffled))
        return [wrong - right for right, wrong in pairs]

    def means(self, kind):
        """{loss: mean over the rows that have it}"""
        names = dict.fromkeys(name for losses in kind for name in losses)
        return {name: average([losses[name] for losses in kind if name in losses]) for name in names}

    @property
    def reads_text(self):
        return len(self.gains) >= LEAST_ROWS and signed_ranks(self.gains) >= SURE

    @property
    def note(self):
        """What is odd although the text is heard; empty where nothing is.

        It is no fault: so hard may a voice be that the base has never met, and is to learn.
        """
        names = ", ".join(name for name, _, _ in self.worse_than_constant)
        if not self.reads_text or not names:
            return ""
        return (f"gate: {names} is above that of a constant answer although the text is heard: a voice that "
                "the base has never met, or clips that are noisy, clipped or played backwards. Listen.")

    @property
    def worse_than_constant(self):
        """[(loss, the base's, the constant's)] where the base is worse in nearly all rows."""
        right, constant = self.means(self.right), self.means(self.constant)
        worse = []
        for name in right:
            pairs = zip(self.right, self.constant)
            excess = [ours[name] - other[name] for ours, other in pairs if name in ours]
            sure = signed_ranks(excess) >= SURE
            if sure and self.weights.get(name) and name != READS_TEXT:
                worse.append((name, right[name], constant[name]))
        return worse

    @property
    def line(self):
        """What was found, for the log."""
        if len(self.gains) < LEAST_ROWS:
            return (f"gate: {len(self.gains)} rows with different texts are too few to compare the base's "
                    f"losses with controls, {LEAST_ROWS} are needed")
        right, shuffled = average(self.totals(self.right)), average(self.totals(self.shuffled))
        better = sum(gain > 0 for gain in self.gains)
        means, constant = self.means(self.right), self.means(self.constant)
        parts = [f"{name} {means[name]:.3f}, constant {constant[name]:.3f}" for name in means]
        return (f"gate: loss {right:.4f} with the right texts, {shuffled:.4f} with shuffled ones, better in "
                f"{better} of {len(self.gains)} rows | {' | '.join(parts)} | {self.seconds:.1f} s")

    @property
    def wrong(self):
        """Texts: what speaks against training on these rows with this base."""
        told = []
        if self.alike:
            told.append("gate: the first rows all have the same text. A model cannot learn from that what a "
                        "text has to do with a recording; look at the column that was read as text.")
        if len(self.gains) < LEAST_ROWS:
            return told
        if self.reads_text:
            return told
        better = sum(gain > 0 for gain in self.gains)
        told.append("gate: the base does no better with the right texts than with those of other rows (in "
                    f"{better} of {len(self.gains)} rows), so it cannot hear that the two belong together. "
                    f"{CAUSES}")
        for name, ours, constant in self.worse_than_constant:
            told.append(f"gate: {name} of the base is {ours:.4f}, worse than the {constant:.4f} of a "
                        "model that always gives the same answer. Usual causes: a base that is not the "
                        "published one, audio of another kind (rate, noise, silence), another codec.")
        return told


def average(values):
    return sum(values) / max(1, len(values))


def signed_ranks(differences):
    """Wilcoxon's statistic in standard deviations: large where most differences, and the large ones, are
    positive. One wild row moves it no more than any other."""
    n = len(differences)
    by_size = sorted(differences, key=abs)
    positive = sum(rank for rank, value in enumerate(by_size, 1) if value > 0)
    spread = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    return (positive - n * (n + 1) / 4) / spread


# ------------------------------------------------------------------------------------------------ looking


@torch.no_grad()
def look(model, clips, cache, weights, device):
    """Findings on the first of the clips. The model is in eval mode afterwards.

    Recordings come out of the cache as the codec made them; only texts are encoded anew.
    """
    model.eval()
    began = time.perf_counter()
    clips = clips[:ROWS]
    rows = [clip.row for clip in clips]
    found = Findings(weights=weights, alike=len(rows) > 1 and len({str(texts(row)) for row in rows}) == 1)
    zeros = {name: p.new_zeros(()).expand(p.shape) for name, p in model.named_parameters()}
    for number, clip in enumerate(clips):
        other = rows[(number + len(rows) // 2) % len(rows)]
        if texts(other) == texts(clip.row):
            continue
        right = cache.load(clip.key)
        shuffled = cache.make(with_texts(clip.row, texts(other)))
        found.right.append(losses(model, right, device))
        found.shuffled.append(losses(model, shuffled, device))
        found.constant.append(losses(model, right, device, zeros))
        if time.perf_counter() - began > SECONDS and len(found.right) >= LEAST_ROWS:
            break
    found.seconds = time.perf_counter() - began
    return found


def losses(model, example, device, parameters=None):
    """{loss: mean} of one row; with other parameters in the model's place where some are given."""
    batch, counts = model.collate([example], [SEED])
    batch = {name: v.to(device) if torch.is_tensor(v) else v for name, v in batch.items()}
    # Not compiled: other parameters, and one row at a time, would compile everything again.
    with torch.compiler.set_stance("force_eager"):
        out = torch.func.functional_call(model, parameters or {}, (batch,))
    names = [name for name in out if name.startswith("loss/") and counts[name]]
    return {name: out[name].item() / counts[name] for name in names}


def spoken(row):
    """What has a text: the row, its turns, the parts of its messages."""
    return [holder for holder in holders(row) if holder.get("text")]


def texts(row):
    return [holder["text"] for holder in spoken(row)]


def with_texts(row, words):
    """A copy of a row that says something else; a conversation takes the other's texts in turn."""
    row = copy.deepcopy(row)
    for number, holder in enumerate(spoken(row)):
        holder["text"] = words[number % len(words)]
    return row
