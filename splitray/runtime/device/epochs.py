"""What one device holds for one engine: the epoch that runs, the one that is staged, the one before, and a spare."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence

from splitray.errors import DeviceLost, InputError
from splitray.model.state_dict_source import StateDictSource
from splitray.model.surgery import weight_bytes
from splitray.runtime.checkpoint import Store
from splitray.runtime.device import kv_copy
from splitray.runtime.device.busy import rss_anon_bytes
from splitray.runtime.device.crossing import Junction
from splitray.runtime.device.holding import Holding, build
from splitray.runtime.wire import Wire
from splitray.runtime.wire.answers import Staged, Stats
from splitray.runtime.wire.messages import Assignment, Lender, StageOrder, Succeeding


class Epochs:
    """Of one device.

    `staged` waits for the switch, `previous` stays until the next run: peers may yet copy from it. `ready` holds slices
    for the case that another device is lost.
    """

    def __init__(self, device: str, wire: Wire, *, token: bytes, source: StateDictSource | None) -> None:
        """Hold nothing yet. `source` gives weights in memory instead of a model folder; `token` is to dial peers."""
        self.device, self.wire = device, wire
        self.current: Holding | None = None
        self.staged: Holding | None = None
        self.previous: Holding | None = None
        self.ready: Holding | None = None
        self._loaded: Holding | None = None
        """Read for a placement that did not come to run."""
        self._staging, self._loading = threading.Lock(), 0
        self._ended: set[int] = set()
        """Sessions that have ended since a placement that is being staged was begun."""
        self._token, self._source = token, source
        self._junction = Junction()

    @property
    def running(self) -> Holding:
        """What runs.

        Raises:
            DeviceLost: nothing does; the process was started anew.
        """
        if self.current is None:
            raise DeviceLost(f"{self.device} holds nothing: it was started anew")
        return self.current

    @property
    def number(self) -> int | None:
        """Of the epoch that runs; None if none does."""
        return self.current.epoch if self.current else None

    def of(self, epoch: int) -> Holding:
        """What was held in an epoch.

        Raises:
            DeviceLost: it is too old, or too new.
        """
        for holding in (self.current, self.previous):
            if holding is not None and holding.epoch == epoch:
                return holding
        raise DeviceLost(f"{self.device} has nothing of epoch {epoch} any more")

    def forget(self) -> None:
        """Hold nothing."""
        self.current = self.staged = self.previous = self.ready = self._loaded = None

    def end(self, session: int) -> None:
        """Free a session's KV."""
        if self._loading:
            self._ended.add(session)
        for holding in (self.current, self.staged, self.previous):
            if holding is not None:
                holding.caches.pop(session, None)

    def make_ready(self, assignment: Assignment, lenders: Sequence[Lender]) -> None:
        """Read what is to be held if another device is lost."""
        donor = self.ready if self.ready is not None and self.ready.assignment.spec == assignment.spec else None
        self.ready = None
        self.ready = self._build(assignment, lenders, donor, old=self.staged or self.current)

    def stage(self, order: StageOrder) -> Staged:
        """Read the slices of the next placement and copy the KV that there is; what runs goes on."""
        spec = order.assignment.spec
        with self._staging:
            kept = next((h for h in (self.staged, self._loaded) if h and h.assignment.spec == spec), None)
            self.staged = self._loaded = None
            self._loading += 1
        try:
            staged = self._build(order.assignment, order.lenders, kept or self.ready)
            self._loaded = staged  # if a copy fails: the next try need not read it again
            copied, valid, copying = 0, {}, time.monotonic()
            for session in order.sessions:
                copied += self.copy(staged, session)
                valid[session.id] = session.stop
                if session.lost:
                    valid[session.id] = staged.caches[session.id].written = _restored(staged, session)
            with self._staging:  # two may be loaded at once, where a fault comes between: the later one is to run
                for ended in self._ended:
                    staged.caches.pop(ended, None)
                if self.staged is None or self.staged.epoch < staged.epoch:
                    self.staged, self._loaded = staged, None
        finally:
            with self._staging:
                self._loading -= 1
                if not self._loading:
                    self._ended.clear()
        return Staged(fingerprint=staged.source.fingerprint(), copied_bytes=copied,  # type: ignore[attr-defined]
                      copy_s=time.monotonic() - copying, valid=valid)  # fmt: skip

    def copy(self, staged: Holding, session: Succeeding) -> int:
        """Bring what is staged the KV of a session, of this device itself and of others.

        Returns:
            Bytes that came over the wire.
        """
        number, start, stop = session.id, session.start, session.stop
        if staged.rule.overtaken(start, stop):
            start = 0
        staged.cache(number, session.capacity).written = stop
        if self.current is not None and number in self.current.caches:
            staged.adopt(self.current, number)
        copied = 0
        for source in session.sources:
            if source.device != self.device:
                copied += kv_copy.fetch(staged, source, number, start, stop, token=self._token)
            elif start < stop:
                for piece in source.pieces:
                    kv = self.running.read(number, piece, start, stop)
                    if kv is not None:
                        staged.write(number, piece, start, *kv)
        return copied

    def waiting(self, epoch: int) -> Holding:
        """What is staged for an epoch.

        Raises:
            DeviceLost: it is not.
        """
        if self.staged is None or self.staged.epoch != epoch:
            raise DeviceLost(f"{self.device} has not staged epoch {epoch}")
        return self.staged

    def switch(self, epoch: int, sessions: Sequence[Succeeding]) -> int:
        """Let what is staged run; first copy what was written since.

        Returns:
            Bytes that came over the wire.
        """
        staged = self.waiting(epoch)
        copied = sum(self.copy(staged, session) for session in sessions)
        self.previous, self.current, self.staged = self.current, staged, None
        self._junction.lead_to(staged.crossing)
        return copied

    def take_back(self, epoch: int) -> dict[int, int]:
        """Undo a switch to an epoch after this one, if there was one.

        Returns:
            Of each session, the positions whose KV is certain to be here.
        """
        before = self.previous
        if before is not None and before.epoch == epoch:
            self.current, self.previous = before, None
            self._junction.lead_to(before.crossing)
        return {n: c.written for n, c in self.current.caches.items()} if self.current else {}

    def stats(self) -> Stats:
        """Memory, bytes, CPU seconds."""
        traffic, held = self.wire.traffic, self.current
        shard = held.shard if held else None
        return Stats(
            weight_bytes=weight_bytes([h.shard for h in (held, self.ready) if h and h.shard]),
            kv_bytes=sum(c.num_bytes for c in list(held.caches.values())) if held else 0,
            checkpoint_bytes_read=shard.source.bytes_read if shard else 0,
            rss_anon_bytes=rss_anon_bytes(),
            cpu_s=time.process_time(),
            pid=os.getpid(),
            messages=traffic.messages,
            payload_bytes=traffic.payload_bytes,
            wire_bytes=traffic.wire_bytes,
            dropped=self.wire.dropped,
            lean=bool(shard and shard.lean),
        )

    def _build(
        self, assignment: Assignment, lenders: Sequence[Lender], ready: Holding | None, old: Holding | None = None
    ) -> Holding:
        return build(assignment, device=self.device, wire=self.wire, junction=self._junction, memory=self._source,
                     old=old or self.current, ready=ready, lenders=lenders, token=self._token)  # fmt: skip


def _restored(staged: Holding, session: Succeeding) -> int:
    """The position below which a session's lost pieces came back from its checkpoints."""
    if session.files and session.store is not None:
        with contextlib.suppress(InputError):  # this device has no way to the store
            valid = Store(session.store).restore(staged, session.id, session.lost, session.files)
            return min(valid, staged.rule.reads_anew or valid)  # older files may be from before that
    return 0
