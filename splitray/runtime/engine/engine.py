"""The engine: one model spread over a fleet of devices, and the runs that it starts on them.

It awaits one value a token; between tokens the devices talk to each other. It decides no placement.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from splitray.arch import ModelArch
from splitray.channel import NoisyChannel
from splitray.codecs import Codec
from splitray.errors import DeviceLost, InputError
from splitray.model.layout import LayerLayout
from splitray.placement import Placement, validate
from splitray.route import Route
from splitray.runtime.engine.epoch import Epoch, Kept, Next
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.protection import Protection
from splitray.runtime.engine.recovery import Fault, Recovery, make_ready, recovered
from splitray.runtime.engine.returns import Returns
from splitray.runtime.engine.run_report import Meter, RunReport
from splitray.runtime.engine.segment import segment
from splitray.runtime.engine.session import Session
from splitray.runtime.engine.stepping import Steps
from splitray.runtime.engine.succession import Succession
from splitray.runtime.fleet import Fleet
from splitray.runtime.sampling import Sampling
from splitray.topology import Topology

Runtime = Literal["local", "process", "ray"]


class Engine:
    """A model running over a fleet. One run at a time; safe to share between threads.

    A run is a row of segments: in each the devices generate among themselves, between two of them the placement may
    change. A migration ends a segment at a token; a fault ends it where it is.

    `members` are the devices, `succession` the placements one after another; this class says when.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        model_path: str | Path,
        arch: ModelArch,
        layout: LayerLayout,
        topology: Topology,
        placement: Placement,
        tokenizer: Any = None,
        lean: bool = True,
        spin_s: float = 0.0,
        pin: bool = False,
        codec: Codec = "none",
        channel: NoisyChannel | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        """Start the fleet and load the shards.

        `spin_s` is how long a receive polls before it sleeps; `pin` gives each device a core of its own. Both are
        for devices on one machine with at least as many cores, where the scheduler may put two on one core. `codec` is
        how partials and states travel (codecs.py): exactly unless it says otherwise; `channel` is what happens to
        them on the way (channel.py): nothing by default. With `recovery` a run survives the loss of devices; without,
        it ends with `DeviceLost`.

        Raises:
            InputError: the placement, the topology or the model cannot be used as asked.
            DeviceLost: a device did not come up.
        """
        validate(placement, arch, topology)
        self.arch, self.tokenizer, self.model_path, self.fleet = arch, tokenizer, str(model_path), fleet
        self.report: RunReport | None = None
        self.tokens = 0
        """Decode steps of all runs so far."""
        self.faults: list[Fault] = []
        self.disturbed = False
        """Whether a fault is being seen to."""
        cores = tuple(sorted(os.sched_getaffinity(0))) if pin else ()
        first = Epoch.of(
            0, placement, topology, arch=arch, layout=layout, model_path=self.model_path, codec=codec, lean=lean,
            cores=cores, channel=channel,
        )  # fmt: skip
        self.members = Members(fleet, recovery)
        self.succession = Succession(self.members, first, spin_s=spin_s)
        self._steps = Steps(self.members)
        self._returns = Returns(self)
        self._lock, self._attempt = threading.Lock(), 0
        self._session: Session | None = None
        try:
            self.members.start([topology.device(d) for d in topology.ids if d in first.route.devices])
            self.succession.stage(first, [])
            self.succession.switch(first, [])
            make_ready(self)
        except BaseException:
            self.close()
            raise

    @property
    def now(self) -> Epoch:
        """What runs."""
        return self.succession.now

    @property
    def next(self) -> Next | None:
        """What is on its way, or was the last that came."""
        return self.succession.next

    @property
    def placement(self) -> Placement:
        """Of the epoch that runs, as the three below."""
        return self.now.placement

    @property
    def topology(self) -> Topology:
        """The devices that it may use."""
        return self.now.topology

    @property
    def route(self) -> Route:
        """Compiled from the placement."""
        return self.now.route

    @property
    def epoch(self) -> int:
        """Its number."""
        return self.now.number

    @property
    def progress(self) -> Session | None:
        """The run that goes on, or None."""
        return self._session

    @property
    def lost(self) -> str | None:
        """Why this engine cannot run any more, or None."""
        return self.members.lost

    @property
    def recovery(self) -> Recovery | None:
        """What is done about lost devices."""
        return self.members.recovery

    @recovery.setter
    def recovery(self, recovery: Recovery | None) -> None:
        self.members.recovery = recovery

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """One run, step or question at a time; what was staged meanwhile takes over behind it.

        Raises:
            DeviceLost: this engine cannot run any more.
        """
        with self._lock:
            self.members.usable()
            yield
        self._switch_at_rest()

    def attempt(self) -> int:
        """A number for what the devices do together next: frames of earlier ones are dropped."""
        self._attempt += 1
        return self._attempt

    def stream(self, prompt_ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Generate for one prompt; yields new ids as they come, a stop id included. Closing it cancels the run.

        Raises:
            InputError: an empty prompt, ids outside the vocabulary, or more tokens than the context holds.
            DeviceLost: a device died or missed its deadline.
        """
        self.check_prompt(prompt_ids, sampling.max_new_tokens)
        for ids in self.stream_batch([list(prompt_ids)], sampling):
            yield ids[0]

    def check_prompt(self, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Refuse a prompt that cannot run."""
        if not prompt_ids:
            raise InputError("prompt", expected="at least one token", actual="none", remedy="write a prompt")
        wrong = [i for i in prompt_ids if not 0 <= i < self.arch.vocab]
        if wrong:
            raise InputError(
                "prompt ids",
                expected=f"ids in [0, {self.arch.vocab})",
                actual=wrong[:5],
                remedy="use this model's tokenizer",
            )
        if len(prompt_ids) + max_new_tokens > self.arch.context_tokens:
            raise InputError(
                "prompt",
                expected=f"prompt and new tokens within the context of {self.arch.context_tokens} tokens",
                actual=f"{len(prompt_ids)} + {max_new_tokens}",
                remedy="shorten the prompt or ask for fewer new tokens",
            )

    def stream_batch(
        self, prompts: list[list[int]], sampling: Sampling, *, attention_mask: list[list[int]] | None = None
    ) -> Iterator[list[int]]:
        """Generate for a batch of equally long prompts (left-padded, with a mask, if they are not)."""
        with self.alone():
            session = Session(
                number=self._attempt + 1, prompt=prompts, attention_mask=attention_mask, sampling=sampling
            )
            protection = Protection.of(self, session)
            self._session, meter = session, Meter()
            try:
                while True:
                    try:
                        finished = yield from segment(self, session, meter, protection)
                        if finished:
                            break
                        self._switch_to_next()
                    except DeviceLost as error:
                        self._recover(error)
                        if session.ended:  # the fault came behind the last token
                            break
            finally:
                self._session = None
                if protection is not None:
                    protection.end()
                self._end(session.number)
            self.report = meter.report(len(prompts))

    def _end(self, session: int) -> None:
        """Free a session's KV; nobody waits for an answer."""
        if self.lost is None:
            for device in self.members.connected:
                with contextlib.suppress(DeviceLost):
                    self.members.order(device, "end", {"session": session})

    def _recover(self, error: DeviceLost) -> None:
        """Go on where the run was, see recovery.py; without a `Recovery`, or a way, the engine ends here."""
        try:
            if self.recovery is None or self.lost is not None:
                raise error
            self.succession.give_up(error)
            self._steps.lost()
            self.disturbed = True
            with self.succession.starting:
                recovered(self, self._session, error)
        except DeviceLost as last:
            self.members.lost = self.lost or str(last)
            raise
        finally:
            self.disturbed = False

    def step(
        self,
        *,
        session: int,
        ids_BT: Tensor,
        position: int,
        keep: int,
        capacity: int,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        reorder: Tensor | None = None,
    ) -> Tensor:
        """One forward for a caller that samples itself (runtime/hf.py).

        Returns:
            Float32 logits [batch, keep, vocab], joined from all holders of the head.
        """
        with self.alone():
            reading = self._steps.read(
                session, ids_BT=ids_BT, places_BT=position_ids, position=position, capacity=capacity, reorder=reorder
            )
            while True:
                try:
                    logits = self._steps.forward(
                        reading, self.now, session=session, attempt=self.attempt(), position=position, keep=keep,
                        attention_mask=attention_mask, places_BT=position_ids, reorder=reorder,
                    )  # fmt: skip
                    self.succession.rewritten(session, position if reorder is None else 0)
                    return logits
                except DeviceLost as error:
                    self._recover(error)

    def forget(self, session: int) -> None:
        """Free a session's KV on every device."""
        with self._lock:
            self._steps.forget(session)
            self._end(session)

    def migrate(self, placement: Placement, *, topology: Topology | None = None, copies_kv: bool = True) -> Next:
        """Stage another placement in the background; it takes over between two tokens of the run, or now if none runs.

        The KV of the run is copied meanwhile or, without `copies_kv`, computed anew from its tokens at the switch: less
        to send where KV is larger than the states of a prompt, and nothing where the new placement is one device.

        Returns:
            What becomes of it; `done` is set once it runs or has failed.

        Raises:
            InputError: the placement does not fit, or another one is on its way.
        """
        coming = self.succession.begin(placement, topology or self.topology, copies_kv)

        def prepare() -> None:
            self.succession.prepare(coming, self._kept)
            self._switch_at_rest()  # if there is no run, nobody else does

        threading.Thread(target=prepare, name="splitray-stage", daemon=True).start()
        return coming

    def _kept(self, coming: Next) -> list[Kept]:
        """What has to move with a placement."""
        kept, session = self._steps.kept(), self._session
        if session is not None and session.steps and coming.copies_kv:
            kept.append(Kept(number=session.number, capacity=session.capacity, stop=session.positions))
        return kept

    def _switch_to_next(self) -> None:
        """Let the staged placement run, if there is one: only between segments, with the lock held."""
        coming, session = self.succession.staged, self._session
        if coming is not None:
            self.succession.take_over(coming, self._kept)
            if coming.error is None and session is not None and not coming.copies_kv:
                session.valid = 0

    def _switch_at_rest(self) -> None:
        """The same where no run goes on: a fault is mended for the next one."""
        if self.succession.staged is None or not self._lock.acquire(blocking=False):
            return  # whoever has the lock looks once more behind it
        try:
            self._switch_to_next()
        except DeviceLost as error:
            with contextlib.suppress(DeviceLost, InputError):
                self._recover(error)
        finally:
            self._lock.release()

    def await_return(self, devices: Sequence[str]) -> None:
        """Start lost devices anew in the background and give them back what they held."""
        self._returns.wait_for(devices, self.succession.whole)

    def stats(self) -> dict[str, dict[str, Any]]:
        """Memory, bytes and CPU seconds of every device."""
        with self.alone():
            return self.members.all_say("stats")

    def slow_links(self, bytes_per_s: float) -> None:
        """Let devices send to each other as slowly as a link of that rate would take it, 0: as fast as it goes.

        An emulation, for demonstrations and tests: the sender waits, the network is as it was.
        """
        self.members.ask(dict.fromkeys(self.members.endpoints, ("pace", {"bytes_per_s": bytes_per_s})))

    def close(self) -> None:
        """Stop every device. Idempotent."""
        self.members.lost = self.lost or "the engine is closed"
        self._returns.close()  # which may be starting a device just now, that must not outlive this
        self.members.close()

    def __enter__(self) -> Self:
        """Use the engine as a context: it closes itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
