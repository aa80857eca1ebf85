"""One engine, one thread, callers in order of arrival. Knows token ids only: no text and no HTTP."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from splitray.errors import DeviceLost

if TYPE_CHECKING:
    from splitray.runtime.sampling import Sampling

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Arch(Protocol):
    """What the service must know of a model."""

    @property
    def context_tokens(self) -> int:
        """Longest sequence, prompt and answer together."""

    @property
    def vocab(self) -> int:
        """Number of token ids."""


class ServedEngine(Protocol):
    """What the service uses of an engine; the tests bring their own."""

    @property
    def arch(self) -> Arch:
        """The model's counts."""

    @property
    def tokenizer(self) -> Any:
        """A transformers tokenizer, or None."""

    @property
    def model_path(self) -> str:
        """Where the checkpoint's configuration lies."""

    @property
    def lost(self) -> str | None:
        """Why no run can start any more, or None."""

    def stream(self, prompt_ids: list[int], sampling: Sampling) -> Iterator[int]:
        """New ids, the stop id included; closing the iterator cancels the run."""

    def close(self) -> None:
        """Let the devices go."""


class EngineQueue:
    """Makes a blocking engine awaitable. All of the engine's life passes on one thread.

    Callers wait for that thread in the order they came. It also launches the engine, because device processes
    may be tied to the thread that started them, and sockets must not change threads while in use.
    """

    def __init__(self, launch: Callable[[], ServedEngine]) -> None:
        """Launch the engine and wait for it; whatever the launch raises comes out here."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")
        self._closing = threading.Event()
        self._lost: str | None = None
        try:
            self.engine = self._thread.submit(launch).result()
        except BaseException:
            self._thread.shutdown(wait=False)
            raise

    @property
    def lost(self) -> str | None:
        """Why the engine cannot run any more, or None."""
        return self._lost or self.engine.lost

    async def stream(self, prompt_ids: list[int], sampling: Sampling) -> AsyncGenerator[int, None]:
        """New ids as they come. Leaving the loop, or being cancelled, cancels the run at its next token.

        Raises:
            InputError: the engine refuses the input.
            DeviceLost: a device died and the run could not go on without it; a later one may, unless `lost` says no.
        """
        loop, arrived, left = asyncio.get_running_loop(), asyncio.Queue[Any](), threading.Event()

        def hand_over(item: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(arrived.put_nowait, item)

        turn = self._thread.submit(self._run, prompt_ids, sampling, left, hand_over)
        try:
            while (item := await arrived.get()) is not _END:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            left.set()
            turn.cancel()  # only has effect on a caller that still waits

    async def call(self, question: Callable[[], T]) -> T:
        """What `question` returns, asked on the engine's thread once the callers before it are served."""
        return await asyncio.wrap_future(self._thread.submit(question))

    def close(self) -> None:
        """End the running generation and the engine; waiting callers are refused. Blocks; may be repeated."""
        if not self._closing.is_set():
            self._closing.set()
            self._thread.submit(self.engine.close).result()
            self._thread.shutdown()

    def _run(
        self, prompt_ids: list[int], sampling: Sampling, left: threading.Event, hand_over: Callable[[Any], None]
    ) -> None:
        try:
            if self.lost or self._closing.is_set():
                raise DeviceLost(self.lost or "the service is shutting down")
            tokens = self.engine.stream(prompt_ids, sampling)
            try:
                for token_id in tokens:
                    hand_over(token_id)
                    if left.is_set():
                        break
                    if self._closing.is_set():
                        raise DeviceLost("the service is shutting down")
            finally:
                if isinstance(tokens, Generator):
                    tokens.close()
        except DeviceLost as error:
            if not getattr(self.engine, "recovers", False):
                self._lost = str(error)
            hand_over(error)
        except Exception as error:  # a boundary: the caller is on another thread
            hand_over(error)
        hand_over(_END)


_END = object()
