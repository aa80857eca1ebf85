"""Training windows without end, with what n-gram teachers expect of them."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from splitray.model.training.kneser_ney import KneserNey
from splitray.model.training.settings import TinySettings


class Batches:
    """An endless stream of training windows, reshuffled by document at every pass over the text.

    The training documents come in two folds. An n-gram model of each fold teaches the other: on text that a
    teacher knows by heart its probabilities would be no honest ones.
    """

    def __init__(self, documents: list[list[int]], chats: list[list[int]], settings: TinySettings, vocabulary: int):
        self.random = np.random.default_rng(settings.seed)
        self.settings, self.tokens = settings, 0
        folds = [documents[0::2], documents[1::2]]
        self.teachers = [KneserNey(fold, vocabulary, documents[0][0]) for fold in reversed(folds)]
        self.tables = [teacher.table() for teacher in self.teachers]
        self.streams = [self._stream(part) for part in [*folds, chats] if part]
        chat = settings.chat_share if chats else 0.0
        self.shares = [(1 - chat) / 2, (1 - chat) / 2, chat][: len(self.streams)]

    def _stream(self, sequences: list[list[int]]) -> Iterator[Callable[[int], np.ndarray]]:
        while True:
            order = self.random.permutation(len(sequences))
            flat = np.concatenate([np.asarray(sequences[i]) for i in order])
            at = int(self.random.integers(0, self.settings.window))
            while at < flat.size:
                taken: list[int] = []

                def take(length: int, at: int = at, flat: np.ndarray = flat, taken: list = taken) -> np.ndarray:
                    taken.append(length)
                    return np.resize(flat[at : at + length], length)

                yield take
                at += taken[0]

    def next(self, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the next windows, ``window + 1`` tokens each, and what the teachers expect of the first ones.

        The rows that have teachers come first; the teachers' rows are one distribution for each token.
        """
        rows, taught = [], []
        counts = self.random.multinomial(max(1, self.settings.batch_tokens // window), self.shares)
        for source, count in enumerate(counts):
            part = [next(self.streams[source])(window + 1) for _ in range(count)]
            rows.extend(part)
            if part and source < len(self.teachers):
                taught.append(self.teachers[source].spread(np.stack(part), self.tables[source]))
        self.tokens += len(rows) * window
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return ids, torch.from_numpy(np.concatenate(taught)) if taught else torch.empty(0, 0)
