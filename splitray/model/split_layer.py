"""A decoder layer of which this device holds a part: stands in HF's layer list and calls HF's own children.

Between sub-blocks it hands its partial sum to an `Exchange`, which returns the next residual. Knows nothing of
devices, sockets or placements.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from splitray.model.layout import LayerLayout

Array = NDArray[np.float32]


class Exchange(Protocol):
    """What a shard needs of the world around it (runtime/device/crossing.py on a wire, or nothing for one device)."""

    def cross(
        self,
        index: int,
        x_BTD: Tensor | None,
        y_BTD: Tensor | None,
        settle: Callable[[Tensor, Tensor], Tensor] | None,
    ) -> Tensor | None:
        """Leave sub-block `index` with residual x and own partial y; return the next residual, or None."""

    def cross_row(self, index: int, x_D: Array | None, y_D: Array | None) -> Array | None:
        """The same for one token of one sequence of a pre-norm family, as a numpy row."""

    def settle_row(
        self, index: int, x_D: Array | None, y_D: Array | None, settle: Callable[[Array, Array], Array]
    ) -> Array | None:
        """The same for a family that normalises sums before the residual is added; `settle` leaves its own row."""

    def sum_over_holders(self, index: int, sums: Tensor) -> Tensor:
        """Sum a small tensor over the holders of sub-block `index`, in device order."""


class LocalSubBlock(nn.Module):
    """norm -> body -> factor of the local slices; `post` is the norm of the sum, where the family has one.

    A device that only settles a sum (it holds the next sub-block) has the `post` and no `body`. Where some sub-blocks
    of a family have no norm of the sum, `post_norm` holds all the same, for all travel alike.
    """

    def __init__(
        self,
        *,
        norm: nn.Module | None,
        body: Callable[..., Tensor] | None,
        post: nn.Module | None,
        scale: float,
        post_norm: bool,
    ) -> None:
        """`body` computes this device's partial sum from the normalised residual; `post_norm` is the family's."""
        super().__init__()
        self.norm, self.post, self.scale = norm, post, scale
        self.body, self.post_norm = body, post_norm

    def partial(self, x_BTD: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """This device's partial sum for the residual x, or None if it holds no slice."""
        if self.body is None:
            return None
        y_BTD = self.body(x_BTD if self.norm is None else self.norm(x_BTD), **arguments)
        return y_BTD if self.scale == 1.0 or self.post_norm else y_BTD * self.scale

    @property
    def settle(self) -> Callable[[Tensor, Tensor], Tensor] | None:
        """For post-norm families: (x, sum of partials) -> x + s * post(sum)."""
        return self._settle if self.post_norm else None

    def _settle(self, x_BTD: Tensor, y_BTD: Tensor) -> Tensor:
        if self.post is not None:
            y_BTD = self.post(y_BTD)
        return x_BTD + (y_BTD if self.scale == 1.0 else y_BTD * self.scale)


class SplitLayer(nn.Module):
    """Replaces a decoder layer: computes what is held here and passes every boundary of the layer."""

    def __init__(
        self,
        *,
        layout: LayerLayout,
        exchange: Exchange,
        argument_names: tuple[str, ...],
        index: int,
        attention: LocalSubBlock,
        ffn: LocalSubBlock,
    ) -> None:
        """`index` is that of the layer's first sub-block in the route."""
        super().__init__()
        self.layout, self.exchange, self.argument_names, self.index = layout, exchange, argument_names, index
        self.attention, self.ffn = attention, ffn
        self.attention_module: nn.Module | None = None
        self.ffn_module: nn.Module | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """HF's layer call: residual in, residual out (of no meaning where this device does not know it)."""
        given = dict(zip(self.argument_names, args, strict=False)) | kwargs
        arguments = {name: given.get(source) for name, source in self.layout.attention_arguments}
        x: Tensor | None = hidden_states
        if self.index == 1:
            x = self.exchange.cross(0, x, None, None)
        if self.layout.parallel:
            halves = [] if x is None else [self.attention.partial(x, arguments), self.ffn.partial(x, {})]
            held = [h for h in halves if h is not None]
            x = self.exchange.cross(self.index, x, sum(held[1:], held[0]) if held else None, None)
        else:
            y = None if x is None else self.attention.partial(x, arguments)
            x = self.exchange.cross(self.index, x, y, self.attention.settle)
            y = None if x is None else self.ffn.partial(x, {})
            x = self.exchange.cross(self.index + 1, x, y, self.ffn.settle)
        return _as_layer(x, hidden_states, self.layout)


class WholeLayer(nn.Module):
    """Replaces a decoder layer that nobody can cut: HF's own, where this device holds it."""

    def __init__(self, *, layout: LayerLayout, exchange: Exchange, index: int, layer: nn.Module | None) -> None:
        """`index` is that of the layer's one sub-block in the route; `layer` is None where it is not held."""
        super().__init__()
        self.layout, self.exchange, self.index, self.layer = layout, exchange, index, layer

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """HF's layer call: residual in, residual out (of no meaning where this device does not know it)."""
        x: Tensor | None = hidden_states
        if self.index == 1:
            x = self.exchange.cross(0, x, None, None)
        out = None if self.layer is None or x is None else self.layer(x, *args, **kwargs)
        y = out[0] if isinstance(out, tuple | list) else out
        return _as_layer(self.exchange.cross(self.index, x, y, _instead), hidden_states, self.layout)


def _instead(_: Tensor, y_BTD: Tensor) -> Tensor:
    return y_BTD


def _as_layer(x: Tensor | None, hidden_states: Tensor, layout: LayerLayout) -> Any:
    """What HF's model loop gets of a layer that took `hidden_states`."""
    out = hidden_states if x is None else x
    if out.shape[-2] != hidden_states.shape[-2]:  # only the kept positions crossed into the head
        kept, out = out, out.new_zeros(hidden_states.shape)
        out[..., -kept.shape[-2] :, :] = kept
    return (out, *[None] * (layout.tuple_size - 1)) if layout.tuple_size else out
