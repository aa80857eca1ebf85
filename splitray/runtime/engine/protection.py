"""Checkpoints of a run while it goes on: when they are due, what they cost, and whether they are being kept at all."""

from __future__ import annotations

import logging
import secrets
import threading
import time

from splitray.errors import DeviceLost, InputError
from splitray.runtime.checkpoint import Store, StoreError, best_period_tokens
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.session import Session
from splitray.runtime.engine.succession import Succession
from splitray.runtime.wire.messages import CheckpointOrder

logger = logging.getLogger(__name__)
_FIRST_TOKENS = 16
_WRITE_S = 60.0  # of silence from a device that writes its part
_END_S = 5.0  # that the end of a run may wait for a checkpoint


class Protection:
    """Saves one session, one checkpoint at a time, in a thread of its own."""

    def __init__(
        self, members: Members, succession: Succession, session: Session, *, url: str, every_tokens: int | None,
        failures_per_s: float,
    ) -> None:  # fmt: skip
        """Without `every_tokens` as Young's formula says from the measured cost and the rate of failures.

        `url` may be that of other engines too.
        """
        self.url, self.session = f"{url}/{secrets.token_hex(6)}-{session.number}", session
        self.problem: str | None = None
        """Why the last checkpoint was not written, or None."""
        self.cost_s = 0.0
        self.count = 0
        self._members, self._succession = members, succession
        self._every_tokens, self._failures_per_s = every_tokens, failures_per_s
        self._store = Store(self.url)
        self._thread: threading.Thread | None = None
        self._began = time.monotonic()

    @staticmethod
    def of(members: Members, succession: Succession, session: Session) -> Protection | None:
        """As the engine's `Recovery` says; None where it names no store."""
        recovery = members.recovery
        if recovery is None or recovery.store is None:
            return None
        return Protection(members, succession, session, url=recovery.store, every_tokens=recovery.every_tokens,
                          failures_per_s=recovery.failures_per_s)  # fmt: skip

    @property
    def period_tokens(self) -> int:
        """Tokens from one checkpoint to the next."""
        if self._every_tokens is not None:
            return self._every_tokens
        steps = len(self.session.steps)
        if not self.count or not steps:
            return _FIRST_TOKENS
        tpot_s = (time.monotonic() - self._began) / steps
        return best_period_tokens(self.cost_s / self.count, self._failures_per_s, tpot_s)

    def token(self) -> None:
        """One more token is there: save if it is time and the last one is done."""
        stop = self.session.positions
        start = self.session.saved[-1].stop if self.session.saved else 0
        if stop - start < self.period_tokens or (self._thread is not None and self._thread.is_alive()):
            return
        self._thread = threading.Thread(target=self._save, args=(start, stop), name="splitray-checkpoint", daemon=True)
        self._thread.start()

    def _save(self, start: int, stop: int) -> None:
        session, now = self.session, self._succession.now
        order = CheckpointOrder(session=session.number, epoch=now.number, start=start, stop=stop, store=self.url)
        try:
            answers = self._members.ask(dict.fromkeys(map(str, now.route.devices), order), within_s=_WRITE_S)
            files = [a.file for a in answers.values() if a.file is not None]
            self._store.write_manifest(session.number, start, files, session.ids)
        except (DeviceLost, InputError, RuntimeError, *StoreError) as error:
            if self._succession.now is not now or self._members.disturbed:
                return  # not the store's fault; the next one comes soon
            if self.problem is None:  # generation goes on; what is not protected is said once
                logger.warning("the run goes on without a new checkpoint: %s", error)
            self.problem = str(error)
            return
        if start != (session.saved[-1].stop if session.saved else 0):
            return  # a fault took back what came before it
        session.saved.extend(files)
        self.problem = None
        self.count += 1
        self.cost_s += sum(a.cpu_s for a in answers.values())

    def end(self) -> None:
        """The session is over: delete its checkpoints, unless the store gives no answer."""
        if self._thread is not None:
            self._thread.join(_END_S)
            if self._thread.is_alive():
                logger.warning("the store %s gives no answer: what is there of the run stays there", self.url)
                return
        self._store.forget()
