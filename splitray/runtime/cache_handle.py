"""CacheHandle: what transformers' code holds in place of keys and values, which stay on the devices.

It knows nothing of sampling; an engine's session begins and ends with it.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import threading
import weakref
from typing import NoReturn

import torch
from torch import Tensor

from splitray.errors import DeviceLost, InputError
from splitray.runtime.engine.engine import Engine

_sessions = itertools.count(1 << 31)  # apart from the sessions of the engine's own loop
_SOON_S = 0.5


class CacheHandle:
    """Stands for the KV that the devices hold: a length, and what to do with it at the next step.

    The devices free their KV when the last reference to it is gone, as transformers' caches are freed.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, engine: Engine, capacity: int) -> None:
        """Name a new session; nothing is allocated until its first step."""
        self.engine, self.capacity = engine, capacity
        self.session = next(_sessions)
        self.length = 0
        self.batch: int | None = None
        """Sequences, known from the first step on."""
        self.reorder: Tensor | None = None
        self._faults = len(engine.faults)
        self._free = weakref.finalize(self, _let_go, engine, self.session)
        self._free.atexit = False  # the devices go with the program

    @property
    def closed(self) -> bool:
        """Whether its KV is gone."""
        return not self._free.alive

    def close(self) -> None:
        """Free the KV on every device. Idempotent."""
        if self._free.detach() is not None:
            self.engine.forget(self.session)

    def check_no_fault(self) -> None:
        """For models whose KV does not come out the same where a whole sequence is read again after a fault.

        Raises:
            DeviceLost: there was a fault.
        """
        if len(self.engine.faults) != self._faults:
            raise DeviceLost("a device was lost, and the rope of this model changes with the length: generate again")

    def check(self, engine: Engine, batch: int) -> None:
        """Refuse a step that its KV cannot take.

        Raises:
            InputError: the KV is gone or elsewhere, or that of another batch.
        """
        if self.closed or self.engine is not engine:
            raise InputError("past_key_values", expected="a cache of this model whose KV the devices hold",
                             actual="one that was freed" if self.closed else "one of another split model",
                             remedy="start again without past_key_values")  # fmt: skip
        if self.length and batch != self.batch:
            raise InputError("input_ids", expected=f"{self.batch} sequences, as past_key_values holds", actual=batch,
                             remedy="call batch_repeat_interleave or batch_select_indices of it before")  # fmt: skip

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions written."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """No fixed limit."""
        return -1

    def _then(self, order: Tensor) -> None:
        if self.length:
            self.reorder = order if self.reorder is None else self.reorder[order]
            self.batch = len(order)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i goes on from beam_idx[i]."""
        self._then(beam_idx.cpu())

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some sequences, named by their numbers or by a mask."""
        self._then(torch.arange(self.batch or 0)[indices.cpu()] if self.length else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        self._then(torch.arange(self.batch or 0).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Drop positions from the end; transformers counts them negative.

        Raises:
            InputError: a positive number, which older transformers took for the length to keep.
        """
        if tokens_to_remove > 0:
            raise InputError("crop", expected="minus the number of positions to drop", actual=tokens_to_remove,
                             remedy=f"give {tokens_to_remove - self.length}")  # fmt: skip
        self.length = max(self.length + tokens_to_remove, 0)
        if not self.length:
            self.reset()

    def activate_past_recording(self) -> None:
        """Nothing to do: every position is kept until the session ends."""

    def reset(self) -> None:
        """Start from position 0 again, perhaps with another batch."""
        if self.batch is not None:
            self.engine.forget(self.session)
        self.length, self.batch, self.reorder = 0, None, None

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied, stored or sent: a session has one owner.

        Raises:
            InputError: always.
        """
        raise InputError("a copy of past_key_values", expected="a cache in this process",
                         actual="KV that stays on the devices", remedy="read the prompt again instead")  # fmt: skip


def _let_go(engine: Engine, session: int) -> None:
    """Free a session that nobody has any more, wherever Python notices: this thread may be in the midst of a step."""
    done = threading.Event()

    def free() -> None:
        with contextlib.suppress(DeviceLost):
            engine.forget(session)
        done.set()

    _thread.start_new_thread(free, ())
    done.wait(_SOON_S)
