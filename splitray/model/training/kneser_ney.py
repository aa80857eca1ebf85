"""An interpolated modified Kneser-Ney n-gram model: the baseline that the shipped model has to beat.

Follows Chen and Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1998): three
discounts per order estimated from the counts of counts, continuation counts below the highest order, and a
uniform distribution under the unigrams. An n-gram that starts a document has no left neighbour to be counted
by, so it keeps its plain count, as the common toolkits do.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Level:
    """What one order knows: its n-grams and contexts as sorted integer keys, beside their weights."""

    grams: Ints
    discounted: Floats
    contexts: Ints
    totals: Floats
    backoff: Floats


def discounts(counts: Ints) -> tuple[float, float, float]:
    """Estimate the discounts of n-grams seen once, twice, and three times or more.

    Where a count of counts is missing (tiny texts, or the unigrams of a small vocabulary) the closed form
    is undefined or leaves its range; the neutral 0.5, 1 and 1.5 then stand in.
    """
    n1, n2, n3, n4 = (int((counts == k).sum()) for k in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:
        return 0.5, 1.0, 1.5
    y = n1 / (n1 + 2 * n2)
    d1, d2, d3 = 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3
    if not (0 < d1 <= 1 and 0 < d2 <= 2 and 0 < d3 <= 3):
        return 0.5, 1.0, 1.5
    return d1, d2, d3


def _lookup(keys: Ints, values: Floats, wanted: Ints) -> Floats:
    """Return the value beside each wanted key, 0 where the key is unknown."""
    if keys.size == 0:
        return np.zeros(wanted.shape)
    at = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[at] == wanted, values[at], 0.0)


class KneserNey:
    """An n-gram model over token ids.

    Args:
        sequences: the training documents as token ids; each starts with ``bos``, which occurs nowhere else.
        vocabulary: the number of token ids; every id is below it.
        bos: the id that starts each document. It is conditioned on and never predicted from text.
        order: the length of the longest n-gram.
    """

    def __init__(self, sequences: Sequence[Sequence[int]], vocabulary: int, bos: int, order: int = 5):
        if float(vocabulary) ** order >= 2**63:
            raise ValueError(f"{order}-grams over {vocabulary} tokens do not fit 64-bit keys")
        if not sequences:
            raise ValueError("no training sequences")
        self.vocabulary, self.bos, self.order = vocabulary, bos, order
        stream = self._stream(sequences)
        plain = [self._grams(stream, k)[0] for k in range(1, order + 1)]
        self._levels = [self._level(plain, k) for k in range(1, order + 1)]

    def _stream(self, sequences: Sequence[Sequence[int]]) -> Ints:
        for sequence in sequences:
            if len(sequence) == 0 or sequence[0] != self.bos:
                raise ValueError("every sequence starts with the bos token")
        return np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])

    def _grams(self, stream: Ints, k: int) -> tuple[Ints, Ints]:
        """Return the keys of all k-grams inside one document, and the positions of their last tokens.

        A window holding ``bos`` anywhere but first would cross into the next document.
        """
        size = stream.size - k + 1
        if size <= 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        keys = np.zeros(size, np.int64)
        inside = np.ones(size, bool)
        for i in range(k):
            part = stream[i : i + size]
            keys = keys * self.vocabulary + part
            if i or k == 1:
                inside &= part != self.bos
        return keys[inside], np.flatnonzero(inside) + k - 1

    def _level(self, plain: list[Ints], k: int) -> _Level:
        keys, counts = np.unique(plain[k - 1], return_counts=True)
        if k < self.order:
            wider = np.unique(plain[k])
            grams, neighbours = np.unique(wider % self.vocabulary**k, return_counts=True)
            first = keys // self.vocabulary ** (k - 1) == self.bos
            keys = np.concatenate([grams, keys[first]])
            counts = np.concatenate([neighbours, counts[first]])
            ordering = np.argsort(keys)
            keys, counts = keys[ordering], counts[ordering]
        step = np.array((0.0, *discounts(counts)))[np.minimum(counts, 3)]
        contexts, where = np.unique(keys // self.vocabulary, return_inverse=True)
        totals = np.bincount(where, weights=counts, minlength=contexts.size).astype(np.float64)
        freed = np.bincount(where, weights=step, minlength=contexts.size)
        return _Level(keys, counts - step, contexts, totals, freed / np.maximum(totals, 1))

    def _interpolate(self, level: _Level, grams: Ints, below: Floats) -> Floats:
        contexts = grams // self.vocabulary
        totals = _lookup(level.contexts, level.totals, contexts)
        seen = _lookup(level.grams, level.discounted, grams) / np.maximum(totals, 1)
        return np.where(totals > 0, seen + _lookup(level.contexts, level.backoff, contexts) * below, below)

    def distribution(self, history: Sequence[int]) -> Floats:
        """Return the probability of every token after ``history``; only its last order - 1 tokens count."""
        probabilities = np.full(self.vocabulary, 1.0 / self.vocabulary)
        tail = [int(token) for token in history]
        for k, level in enumerate(self._levels, start=1):
            if k - 1 > len(tail):
                break
            context = 0
            for token in tail[len(tail) - k + 1 :]:
                context = context * self.vocabulary + token
            grams = context * self.vocabulary + np.arange(self.vocabulary, dtype=np.int64)
            probabilities = self._interpolate(level, grams, probabilities)
        return probabilities

    def table(self) -> npt.NDArray[np.float32]:
        """Return the bigram distributions after every token, one row each; ``spread`` starts from them."""
        level = self._levels[1]
        backoff, totals = np.ones(self.vocabulary), np.ones(self.vocabulary)
        backoff[level.contexts], totals[level.contexts] = level.backoff, level.totals
        rows = np.outer(backoff, self.distribution([]))
        rows.reshape(-1)[level.grams] += level.discounted / totals[level.grams // self.vocabulary]
        return rows.astype(np.float32)

    def spread(self, windows: Ints, table: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Return the distribution after each token of ``windows`` but the last ones, all rows in one matrix.

        No history reaches before the start of a row; ``table`` is what ``table()`` returned.
        """
        count, length = windows.shape[0], windows.shape[1] - 1
        rows = table[windows[:, :-1].reshape(-1)]
        context = windows[:, :-1].astype(np.int64)
        for k in range(3, self.order + 1):
            before = np.full((count, length), -1, np.int64)
            before[:, k - 2 :] = windows[:, : max(0, length - k + 2)]
            known = (before >= 0) & (context >= 0)
            context = np.where(known, before * self.vocabulary ** (k - 2) + context, -1)
            level, wanted = self._levels[k - 1], context.reshape(-1)
            if level.contexts.size == 0:
                break
            at = np.minimum(np.searchsorted(level.contexts, wanted), level.contexts.size - 1)
            hit = np.flatnonzero(level.contexts[at] == wanted)
            at = at[hit]
            rows[hit] *= level.backoff[at].astype(np.float32)[:, None]
            # The n-grams of one context lie side by side, since the keys are sorted.
            first = np.searchsorted(level.grams, level.contexts[at] * self.vocabulary)
            many = np.searchsorted(level.grams, (level.contexts[at] + 1) * self.vocabulary) - first
            offset = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
            gram = np.repeat(first, many) + offset
            rows[np.repeat(hit, many), level.grams[gram] % self.vocabulary] += (
                level.discounted[gram] / np.repeat(level.totals[at], many)
            ).astype(np.float32)
        return rows

    def bits(self, sequences: Sequence[Sequence[int]]) -> float:
        """Return the total of -log2 p over all tokens of ``sequences`` but their leading bos."""
        stream = self._stream(sequences)
        probabilities = np.full(stream.size, 1.0 / self.vocabulary)
        for k, level in enumerate(self._levels, start=1):
            grams, last = self._grams(stream, k)
            probabilities[last] = self._interpolate(level, grams, probabilities[last])
        return float(-np.log2(probabilities[stream != self.bos]).sum())
