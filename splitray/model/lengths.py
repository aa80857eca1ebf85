"""What of a model depends on how long a sequence is: rope tables that change past a border, and what is read anew.

transformers decides by the longest position of each forward (`dynamic_rope_update`). A prompt that is read here in
chunks, or read again after a fault, is one forward there or many: the `LengthRule` says which positions share a length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from splitray.errors import unsplittable

_READ_ANEW = ("phi3", "phimoe")  # what their prepare_inputs_for_generation does is followed here
_OWN_LOOPS = ("prepare_inputs_for_generation", "_prepare_cache_for_generation", "_update_model_kwargs_for_generation")


@dataclass(frozen=True, slots=True)
class LengthRule:
    """At which lengths the tables of a model change, in tokens."""

    borders: tuple[int, ...] = ()
    """Lengths past which other factors hold (longrope)."""
    grows_from: int | None = None
    """The length past which each further token changes the table (dynamic)."""
    reads_anew: int | None = None
    """A generation that grows past this length reads everything again (phi3)."""

    @property
    def changes(self) -> bool:
        """Whether anything depends on the length."""
        return bool(self.borders) or self.grows_from is not None

    def spans(
        self, start: int, prompt: int, total: int, length_of: Callable[[int], int]
    ) -> Iterator[tuple[int, int, int | None]]:
        """How [start, total) is read so that KV is what transformers has: its prompt at once, then token after token.

        Args:
            start: positions below it are there.
            prompt: tokens of the prompt alone; those behind it were generated.
            total: tokens known.
            length_of: the length in tokens, without padding, of so many first positions.

        Yields:
            (first position, end, length that decides for all of them; None where nothing depends on it).
        """
        if not self.changes:
            if start < total:
                yield start, total, None
            return
        at = prompt
        if self.reads_anew is not None and prompt <= self.reads_anew < total:
            at, start = self.reads_anew + 1, 0 if start <= self.reads_anew else start
        if start < at:
            yield start, at, length_of(at)
        at = max(start, at)
        while at < total:
            stop, kind = at + 1, self._kind(length_of(at + 1))
            while stop < total and self._kind(length_of(stop + 1)) == kind:
                stop += 1
            yield at, stop, length_of(stop)
            at = stop

    def lost_by_reading_again(self, tokens: int, *, padded: bool) -> bool:
        """Whether so many tokens, read at once, perhaps give other KV than a prompt and then token after token."""
        borders = (*self.borders, *(() if self.grows_from is None else (self.grows_from,)))
        return bool(borders) and tokens > min(borders) and (padded or self.reads_anew is None)

    def overtaken(self, start: int, stop: int) -> bool:
        """Whether KV copied when `start` positions were read was read anew before `stop` of them were."""
        return self.reads_anew is not None and start <= self.reads_anew < stop

    def _kind(self, length: int) -> tuple[int, ...]:
        grown = 0 if self.grows_from is None else max(length, self.grows_from)
        return (grown, *(length > b for b in self.borders))


def length_rule(config: PretrainedConfig) -> LengthRule:
    """Read from a config's rope parameters, one set or one for each type of layer."""
    found: Any = getattr(config, "rope_parameters", None) or {}
    sets = [found, *(v for v in found.values() if isinstance(v, dict))]
    longrope = [s for s in sets if s.get("rope_type") == "longrope"]
    dynamic = any("dynamic" in str(s.get("rope_type")) for s in sets)
    anew = getattr(config, "original_max_position_embeddings", None) if longrope else None
    return LengthRule(
        borders=tuple(sorted({s["original_max_position_embeddings"] for s in longrope})),
        grows_from=config.max_position_embeddings if dynamic else None,
        reads_anew=anew if config.model_type in _READ_ANEW else None,
    )


def check_generation(model: type[PreTrainedModel], config: PretrainedConfig) -> None:
    """Refuse a family that prepares the steps of a generation in a way of its own.

    Raises:
        ModelError: it does; says which method.
    """
    own = [n for n in _OWN_LOOPS if getattr(model, n, None) is not getattr(GenerationMixin, n)]
    if own and config.model_type not in _READ_ANEW:
        what = f"architecture {config.model_type}"
        raise unsplittable(what, "transformers' default generation", f"{model.__name__}.{own[0]}")


class RopeLength:
    """The length by which a model's rope modules decide, instead of the positions that they are given."""

    def __init__(self, model: nn.Module, config: PretrainedConfig) -> None:
        """Take over the rope modules of a model in which something depends on the length."""
        self.rule = length_rule(config)
        self.length = 1
        if self.rule.changes:
            for module in model.modules():
                if "RotaryEmbedding" in type(module).__name__:
                    module.forward = self._with_length(module, module.forward)

    def begin(self, cache: Any, position_ids: Tensor, length: int | None) -> None:
        """Open a step: `length` if it is known, else that of the positions, as transformers decides."""
        if not self.rule.changes:
            return
        self.length = length or int(position_ids.max()) + 1
        border = self.rule.grows_from
        if border is not None and self.length >= border:  # a table that has grown stays, in one session
            self.length = max(self.length, cache.longest)
        cache.longest = self.length

    def _with_length(self, module: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        def with_length(x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.rule.grows_from is not None:
                _forget_growth(module)
            last = position_ids.new_full((*position_ids.shape[:-1], 1), self.length - 1)
            out = forward(x, torch.cat([position_ids, last], dim=-1), *args, **kwargs)
            return tuple(t[..., :-1, :] for t in out) if isinstance(out, tuple) else out[..., :-1, :]

        return with_length


def _forget_growth(module: Any) -> None:
    """Undo what an earlier step, perhaps of another session, has left in a rope module."""
    for name in [n for n in vars(module) if n.endswith("max_seq_len_cached")]:
        setattr(module, name, module.original_max_seq_len)
    for name, buffer in list(module.named_buffers(recurse=False)):
        if name.endswith("original_inv_freq"):
            setattr(module, name.replace("original_inv_freq", "inv_freq"), buffer.clone())
