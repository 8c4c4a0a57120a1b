"""Choosing the next code: penalty, temperature, top-k and top-p, and beam search with or without sampling.

Written to replay what transformers 4.52 does with the same settings, as far as that does not hang on its
random numbers:

    scores (rows, V) ─penalise─▶ ─narrow (sampling only)─▶ + score of the beam ─▶ 2 x beams candidates
    a candidate that is the stop code ends its beam if it ranks among the first `beams`, else it is forgotten

Drawing k candidates without putting them back is taking the k largest of score + Gumbel noise (arXiv
1903.06059).
"""
import math
from typing import NamedTuple

import torch


def penalise(scores, used, penalty):
    """Codes that a row has used become less likely: negative scores times the penalty, positive ones over it.
    scores, used (bool): (rows, V)."""
    lower = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(used, lower, scores)


def narrow(scores, temperature, top_k, top_p, least):
    """Scores over temperature, -inf where top-k or top-p leave a code out; at least `least` of a row stay."""
    scores = scores / temperature
    if 0 < top_k < scores.shape[-1]:
        smallest = scores.topk(max(top_k, least))[0][..., -1:]
        scores = scores.masked_fill(scores < smallest, -math.inf)  # ties with the k-th stay
    if top_p < 1:
        # Only what top-k leaves is put in order: sorting 8194 scores takes longer than many a step.
        left = (scores > -math.inf).sum(-1)
        ordered, order = scores.topk(int(left.max()))
        ordered = ordered.flip(-1)
        order = order.flip(-1)
        out = ordered.softmax(-1).cumsum(-1) <= 1 - top_p  # from the least likely on
        out[..., -least:] = False
        removed = torch.zeros_like(scores, dtype=torch.bool)
        removed.scatter_(-1, order, out)
        scores = scores.masked_fill(removed, -math.inf)
    return scores


def gumbel(shape, generator):
    """Noise that makes the largest sum a draw from the softmax; from the CPU, the same on all devices."""
    uniform = torch.rand(shape, generator=generator).clamp_(min=torch.finfo(torch.float32).tiny)
    return -torch.log(-torch.log(uniform))


class Ending(NamedTuple):
    score: float  # sum of the chosen scores, over length ** length_penalty
    codes: list
    by_itself: bool  # by the stop code, not because there was no room left


class Beams:
    """The beams of one text. `choose` takes the candidates of a step; `done`: no better ending can come."""

    def __init__(self, beams, stop, length_penalty):
        self.beams, self.stop, self.length_penalty = beams, stop, length_penalty
        self.codes = [[] for _ in range(beams)]  # of each running beam
        self.scores = [0.0] + [-1e9] * (beams - 1)  # at the start all beams are the same: only one may branch
        self.endings = []  # the best ones, at most `beams`
        self.done = False

    def end(self, score, codes, length, by_itself):
        score = score / length**self.length_penalty
        if len(self.endings) < self.beams or score > self.worst():
            self.endings.append(Ending(score, codes, by_itself))
        if len(self.endings) > self.beams:
            self.endings.remove(min(self.endings, key=lambda ending: ending.score))

    def worst(self):
        return min(ending.score for ending in self.endings)

    def choose(self, scores, codes, parents):
        """Lists of 2 x beams candidates, best first. -> (parent, code) of each beam that runs on."""
        length = len(self.codes[0]) + 1  # with the code that is chosen now
        kept = []
        for rank, candidate in enumerate(zip(scores, codes, parents)):
            score, code, parent = candidate
            if code != self.stop:
                kept.append(candidate)
            elif rank < self.beams:
                self.end(score, self.codes[parent], length, by_itself=True)
            if len(kept) == self.beams:
                break
        self.codes = [[*self.codes[parent], code] for _, code, parent in kept]
        self.scores = [score for score, _, _ in kept]
        if len(self.endings) == self.beams:
            self.done = self.worst() >= max(scores) / length**self.length_penalty
        return [(parent, code) for _, code, parent in kept]

    def best(self):
        """The best ending; what still runs is ended where it stands, unless no better one can come."""
        if not self.done:
            for score, codes in zip(self.scores, self.codes):
                self.end(score, codes, len(codes), by_itself=False)
            self.done = True
        return max(reversed(self.endings), key=lambda ending: ending.score)
