"""A symbolic simulation of who knows what along a route: the oracle of the exchange rule.

It is written from the text of the rule and shares no code with `splitray/route.py`. A residual is a multiset of atoms,
the embedding's and one for each head group and FFN column added so far. A device can form the next if some of
its facts sum to it with every atom exactly once.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

from splitray.arch import ModelArch
from splitray.placement import Placement, Shares
from splitray.route import Message, Route
from splitray.topology import DeviceId, Topology


@dataclasses.dataclass(frozen=True)
class Stage:
    """A sub-block read straight off the placement: each holder's atoms, and all atoms it adds."""

    kind: str
    atoms: dict[str, frozenset[tuple]]
    adds: frozenset[tuple]

    @property
    def partitioned(self) -> bool:
        return any(own != self.adds for own in self.atoms.values())


def stages_of(placement: Placement, arch: ModelArch) -> list[Stage]:
    def atoms(piece: str, layer: int, shares: Shares) -> dict[str, set[tuple]]:
        return {
            str(d): {(piece, layer, i) for r in ranges for i in range(r.start, r.stop)}
            for d, ranges in shares.by_device
        }

    def stage(kind: str, held: dict[str, set[tuple]]) -> Stage:
        return Stage(kind, {d: frozenset(own) for d, own in held.items()}, frozenset(set().union(*held.values())))

    stages = [stage("embedding", {str(d): {("embedding",)} for d in placement.embedding})]
    for i, layer in enumerate(placement.layers):
        heads, columns = atoms("group", i, layer.attention), atoms("column", i, layer.ffn)
        if arch.parallel_block:
            union = {d: heads.get(d, set()) | columns.get(d, set()) for d in heads.keys() | columns.keys()}
            stages.append(stage("layer", union))
        else:
            stages += [stage("attention", heads), stage("ffn", columns)]
    return [*stages, stage("head", atoms("row", 0, placement.head))]


Fact = tuple[str, Counter]  # ("x", residual so far) | ("y", a partial) | ("xy", their sum) | ("x'", the next)


def facts_sent(message: Message, x: Counter, own: Counter, folds: bool) -> list[Fact]:
    """What a message tells, by the rule's text: where x can fold, the lead's partial carries it."""
    match message.content:
        case "state":
            return [("x'", x + own)]
        case "partial":
            return [("xy", x + own) if folds else ("y", own)]
        case "partial_and_state":
            return [("xy", x + own) if folds else ("y", own), ("x", x)]
    raise AssertionError(f"{message.content} between two sub-blocks")


def can_form(facts: list[Fact], x: Counter, adds: Counter, post_norm: bool) -> bool:
    """Whether some of the facts make the next residual, each atom exactly once, by adding only.

    A post-norm family normalises the sum of all partials before it adds x: x must be known apart.
    """
    if any(kind == "x'" and value == x + adds for kind, value in facts):
        return True
    for n in range(1, len(facts) + 1):
        for chosen in itertools.combinations(facts, n):
            total = sum((value for _, value in chosen), Counter())
            if post_norm:
                summed = sum((value for kind, value in chosen if kind == "y"), Counter())
                plain_x = [value for kind, value in chosen if kind == "x"]
                if summed == adds and plain_x == [x]:
                    return True
            elif total == x + adds:
                return True
    return False


def adds_up(received: list[Fact], own: list[Fact], x: Counter, adds: Counter, post_norm: bool) -> bool:
    """Whether a receiver that simply adds all it got to all it has counts every atom exactly once."""
    got = received + own
    if any(kind == "x'" for kind, _ in got):
        return len(got) == 1
    values = [value for kind, value in got if not (post_norm and kind == "x")]
    if post_norm:
        residuals = [value for kind, value in got if kind == "x"]
        return residuals == [x] and sum(values, Counter()) == adds
    return sum(values, Counter()) == x + adds


def complaints(route: Route, placement: Placement, arch: ModelArch, topology: Topology) -> list[str]:
    """Everything in which a route breaks the exchange rule; empty for a right one."""
    stages = stages_of(placement, arch)
    found = wrong_sub_blocks(route, stages, topology)
    by_boundary = {(b.after, b.inner): b.messages for b in route.boundaries}
    if len(by_boundary) != len(route.boundaries):
        found.append("a boundary stands twice")
    for after, messages in by_boundary.items():
        pairs = [(m.source, m.target) for m in messages]
        found += [f"{after}: {p} twice" for p, n in Counter(pairs).items() if n > 1]
        found += [f"{after}: {s} to itself" for s, t in pairs if s == t]

    x: Counter = Counter()
    for index, (here, there) in enumerate(itertools.pairwise(stages)):
        adds = Counter(here.adds)
        order = [d for d in map(str, topology.ids) if d in here.atoms]
        lead = order[0]
        folds = here.partitioned and not arch.post_norm
        messages = by_boundary.pop((index, False), ())
        found += [f"{index}: {m.source} knows nothing" for m in messages if m.source not in here.atoms]
        found += [f"{index}: {m.target} needs nothing" for m in messages if m.target not in there.atoms]
        messages = tuple(m for m in messages if m.source in here.atoms and m.target in there.atoms)
        for receiver in there.atoms:
            mine = Counter(here.atoms.get(receiver, ()))
            can_alone = receiver in here.atoms and not here.partitioned
            own: list[Fact] = []
            if can_alone:
                own = [("x'", x + adds)]
            elif receiver in here.atoms and folds and receiver == lead:
                own = [("xy", x + mine)]
            elif receiver in here.atoms:
                # Where the lead folds, x comes with its partial and a holder leaves its own x out of the sum.
                own = [("y", mine)] if folds else [("y", mine), ("x", x)]
            # To form x' in another way a holder may also use the x it has.
            known = [*own, *([("x", x)] if receiver in here.atoms else []), *([("y", mine)] if mine else [])]
            inbox = [m for m in messages if m.target == receiver]
            told = [(m, facts_sent(m, x, Counter(here.atoms[m.source]), folds and m.source == lead)) for m in inbox]
            for m, facts in told:
                if facts[0][0] == "x'" and here.partitioned:
                    found.append(f"{index}: {m.source} cannot know the sum it sends to {receiver}")
            received = [fact for _, facts in told for fact in facts]
            if not adds_up(received, own, x, adds, arch.post_norm):
                found.append(f"{index}: {receiver} does not count every atom once")
            for m, _ in told:
                others = [fact for n, facts in told if n is not m for fact in facts]
                if can_form([*known, *others], x, adds, arch.post_norm):
                    found.append(f"{index}: {m.source} -> {receiver} is superfluous")
            found += wrong_sender(index, inbox, order, here, receiver, arch, topology)
        inner = {(m.source, m.target, m.content) for m in by_boundary.pop((index, True), ())}
        together = arch.qk_norm_over_heads and here.kind == "attention" and here.partitioned
        wanted = {(a, b, "norm_sums") for a, b in itertools.permutations(here.atoms, 2)} if together else set()
        if inner != wanted:
            found.append(f"{index}: inner exchange {inner} and not {wanted}")
        x = x + adds
    return found + wrong_ends(by_boundary, stages, placement, topology)


def wrong_sub_blocks(route: Route, stages: list[Stage], topology: Topology) -> list[str]:
    """The route's stages are the placement's, their holders in device order."""
    found = []
    if [b.kind for b in route.sub_blocks] != [s.kind for s in stages]:
        return [f"kinds {[b.kind for b in route.sub_blocks]}"]
    for index, (block, stage) in enumerate(zip(route.sub_blocks, stages, strict=True)):
        order = tuple(d for d in topology.ids if d in stage.atoms)
        mode = "partitioned" if stage.partitioned else "replicated" if len(order) > 1 else "whole"
        if (block.index, block.devices, block.mode) != (index, order, mode):
            found.append(f"{index}: {block} and not {mode} on {order}")
    return found


def wrong_sender(
    index: int,
    inbox: list[Message],
    order: list[str],
    here: Stage,
    receiver: str,
    arch: ModelArch,
    topology: Topology,
) -> list[str]:
    """A whole or replicated state comes from the cheapest holder, the first of equals."""
    if here.partitioned or receiver in order:
        return []
    num_bytes = arch.hidden_dim * arch.dtype_bytes
    links = [topology.link(DeviceId(d), DeviceId(receiver)) for d in order]
    prices = [link.transfer_s(num_bytes) for link in links if link is not None]
    assert len(prices) == len(order)
    cheapest = order[prices.index(min(prices))]
    return [f"{index}: {m.source} is not the cheapest" for m in inbox if m.source != cheapest]


def wrong_ends(
    rest: dict[tuple[int, bool], tuple[Message, ...]],
    stages: list[Stage],
    placement: Placement,
    topology: Topology,
) -> list[str]:
    """Each head holder tells the first one its best row; that one tells who must know the token."""
    last = len(stages) - 1
    sampler, *others = [d for d in topology.ids if d in stages[last].atoms]
    to_sampler = {(m.source, m.target, m.content) for m in rest.pop((last, False), ())}
    tokens = {(m.source, m.target, m.content) for m in rest.pop((last + 1, False), ())}
    told = ({topology.origin} | set(placement.embedding)) - {sampler}
    found = []
    if to_sampler != {(d, sampler, "best") for d in others}:
        found.append(f"head to sampler: {to_sampler}")
    if tokens != {(sampler, d, "token") for d in told}:
        found.append(f"token: {tokens}")
    return found + [f"{after}: messages where none belong" for after, messages in rest.items() if messages]
