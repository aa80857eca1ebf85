"""The engine: one model spread over a fleet of devices, and the runs that it starts on them.

It awaits one value a token; between tokens the devices talk to each other. It decides no placement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from splitray.arch import ModelArch
from splitray.channel import NoisyChannel
from splitray.codecs import Codec
from splitray.errors import DeviceLost
from splitray.model.layout import Layouts
from splitray.placement import Placement, validate
from splitray.route import Route
from splitray.runtime.engine.epoch import Epoch, Next
from splitray.runtime.engine.members import Members
from splitray.runtime.engine.policy import Recovery
from splitray.runtime.engine.protection import Protection
from splitray.runtime.engine.recovery import Fault
from splitray.runtime.engine.returns import Returns
from splitray.runtime.engine.run_report import Meter, RunReport
from splitray.runtime.engine.segment import segment
from splitray.runtime.engine.session import Session, check_prompt
from splitray.runtime.engine.stepping import Forward, Steps
from splitray.runtime.engine.succession import Succession
from splitray.runtime.engine.upkeep import Upkeep
from splitray.runtime.fleet import Fleet
from splitray.runtime.sampling import Sampling
from splitray.runtime.wire.messages import EndOrder, PaceOrder, StatsOrder
from splitray.runtime.wire.packing import to_plain
from splitray.topology import Topology

_STATS_S = 10.0


class Engine:
    """A model running over a fleet. One run at a time; safe to share between threads.

    A run is a row of segments: in each the devices generate among themselves, between two of them the placement may
    change. A migration ends a segment at a token; a fault ends it where it is.

    `members` are the devices, `succession` the placements one after another.
    """

    def __init__(
        self,
        *,
        fleet: Fleet,
        model_path: str | Path,
        arch: ModelArch,
        layout: Layouts,
        topology: Topology,
        placement: Placement,
        tokenizer: Any = None,
        lean: bool = True,
        spin_s: float = 0.0,
        codec: Codec = "none",
        channel: NoisyChannel | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        """Start the fleet and load the shards.

        `spin_s` is how long every receive polls before it sleeps, for devices on one machine with at least as many
        cores; 0 leaves it to the devices (runtime/wire/waits.py).
        `codec` is how partials and states travel (codecs.py): exactly unless it says otherwise; `channel` is what
        happens to them on the way (channel.py): nothing by default. With `recovery` a run survives the loss of
        devices; without, it ends with `DeviceLost`.

        Raises:
            InputError: the placement, the topology or the model cannot be used as asked.
            DeviceLost: a device did not come up.
        """
        validate(placement, arch, topology)
        if recovery is not None:
            recovery.check(topology)
        self.arch, self.tokenizer, self.model_path, self.fleet = arch, tokenizer, str(model_path), fleet
        self.report: RunReport | None = None
        self.tokens = 0
        """Decode steps of all runs so far."""
        first = Epoch.of(
            0, placement, topology, arch=arch, layout=layout, model_path=self.model_path, codec=codec, channel=channel,
            lean=lean,
        )  # fmt: skip
        self.members = Members(fleet, recovery)
        self.succession = Succession(self.members, first, spin_s=spin_s)
        self._steps = Steps(self.members)
        self._upkeep = Upkeep(self.members, self.succession, self._steps)
        self._attempt = 0
        try:
            self.members.start([topology.device(d) for d in topology.ids if d in first.route.devices])
            self.succession.stage(first, [])
            self.succession.switch(first, [])
            self._upkeep.begin()
        except BaseException:
            self.close()
            raise

    @property
    def now(self) -> Epoch:
        """The epoch that runs."""
        return self.succession.now

    @property
    def next(self) -> Next | None:
        """The epoch on its way, or the last one that was."""
        return self.succession.next

    @property
    def placement(self) -> Placement:
        """Which device holds what, in the epoch that runs."""
        return self.now.placement

    @property
    def topology(self) -> Topology:
        """The devices and links that the epoch that runs may use."""
        return self.now.topology

    @property
    def route(self) -> Route:
        """What runs where and which messages cross, in the epoch that runs."""
        return self.now.route

    @property
    def epoch(self) -> int:
        """The number of the epoch that runs."""
        return self.now.number

    @property
    def progress(self) -> Session | None:
        """The run that goes on, or None."""
        return self._upkeep.session

    @property
    def faults(self) -> list[Fault]:
        """The faults that were met and mended, in order."""
        return self._upkeep.faults

    @property
    def _returns(self) -> Returns | None:
        """Who looks after devices beside the runs; None without a `Recovery`."""
        return self._upkeep.returns

    @property
    def recovers(self) -> bool:
        """Whether it may run again after a run that ended with `DeviceLost`."""
        return self.members.recovery is not None

    @property
    def lost(self) -> str | None:
        """Why this engine cannot run any more, or None."""
        return self.members.lost

    def alone(self) -> AbstractContextManager[None]:
        """One run, step or question at a time; what was staged meanwhile takes over behind it.

        Raises:
            DeviceLost: this engine cannot run any more.
        """
        return self._upkeep.alone()

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
        check_prompt(prompt_ids, sampling.max_new_tokens, self.arch)
        for ids in self.stream_batch([list(prompt_ids)], sampling):
            yield ids[0]

    def stream_batch(
        self, prompts: list[list[int]], sampling: Sampling, *, attention_mask: list[list[int]] | None = None
    ) -> Iterator[list[int]]:
        """Generate for a batch of equally long prompts (left-padded, with a mask, if they are not)."""
        with self.alone():
            session = Session(
                number=self._attempt + 1, prompt=prompts, attention_mask=attention_mask, sampling=sampling
            )
            members, succession, upkeep, meter = self.members, self.succession, self._upkeep, Meter()
            protection = Protection.of(members, succession, session)

            def came() -> None:
                self.tokens += 1
                if protection is not None:
                    protection.token()

            upkeep.session = session
            try:
                while True:
                    try:
                        finished = yield from segment(members, succession, session, self.attempt(), meter, came)
                        if finished:
                            break
                        upkeep.take_over()
                    except DeviceLost as error:
                        upkeep.mend(error)
                        if session.ended:  # the fault came behind the last token
                            break
            finally:
                upkeep.session = None
                if protection is not None:
                    protection.end()
                self._end(session.number)
            self.report = meter.report(len(prompts))

    def _end(self, session: int) -> None:
        """Free a session's KV; nobody waits for an answer."""
        if self.lost is None:
            self.members.tell_all(EndOrder(session=session))

    def step(self, forward: Forward) -> Tensor:
        """One forward for a caller that samples itself (runtime/hf.py).

        Returns:
            Float32 logits [batch, keep, vocab], joined from all holders of the head.

        Raises:
            DeviceLost: a device is gone, and nothing could be done about it.
        """
        with self.alone():
            reading = self._steps.read(forward)
            while True:
                try:
                    logits = self._steps.run(reading, forward, self.now, self.attempt())
                    self.succession.rewritten(forward.session, forward.position if forward.reorder is None else 0)
                    return logits
                except DeviceLost as error:
                    self._upkeep.mend(error)

    def forget(self, session: int) -> None:
        """Free a session's KV on every device."""
        with self._upkeep.working:
            self._steps.forget(session)
            self._end(session)

    def migrate(self, placement: Placement, *, topology: Topology | None = None, copies_kv: bool = True) -> Next:
        """Stage another placement in the background; it takes over between two tokens of the run, or now if none runs.

        A `topology` that is given is from then on all that there is: devices that it leaves out are not waited for.

        The KV of the run is copied meanwhile or, without `copies_kv`, computed anew from its tokens at the switch: less
        to send where KV is larger than the states of a prompt, and nothing where the new placement is one device.

        Returns:
            What becomes of it; `done` is set once it runs or has failed.

        Raises:
            InputError: the placement does not fit, or another one is on its way.
        """
        return self._upkeep.migrate(
            placement, topology or self.topology, copies_kv=copies_kv, lasting=topology is not None
        )

    def stats(self) -> dict[str, dict[str, Any]]:
        """Memory, bytes and CPU seconds of every device that is there; also while a run goes on.

        Where none does, after all that was ordered before: KV of a session that has ended is not counted.

        Raises:
            DeviceLost: a device that the run needs gives no answer.
        """
        self.members.usable()
        if self._upkeep.working.acquire(blocking=False):
            try:
                self.members.settle()
            finally:
                self._upkeep.working.release()
        found = self.members.ask(dict.fromkeys(self.members.endpoints, StatsOrder()), within_s=_STATS_S, some=True)
        missing = [str(d) for d in self.route.devices if d not in found]
        if missing:
            raise DeviceLost(f"{', '.join(missing)}: no answer; ask again when the fault is mended")
        return {d: to_plain(s) for d, s in found.items()}

    def slow_links(self, bytes_per_s: float) -> None:
        """Let devices send to each other as slowly as a link of that rate would take it, 0: as fast as it goes.

        An emulation, for demonstrations and tests: the sender waits, the network is as it was.
        """
        self.members.ask(dict.fromkeys(self.members.endpoints, PaceOrder(bytes_per_s=bytes_per_s)))

    def close(self) -> None:
        """Stop every device. Idempotent."""
        self.members.lost = self.lost or "the engine is closed"
        self.members.close()
        self._upkeep.close()

    def __enter__(self) -> Self:
        """Use the engine as a context: it closes itself."""
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
