"""How one decoder layer is wired, read off Hugging Face's own code by watching it run once.

A layer is two residual sub-blocks, x + s * post(attention(norm(x))) and the same for the FFN, one after the other
or both from one x. Which child is which norm, and which layer argument reaches the attention under which name, is
observed on a small random model and not written down per family. A layer that is wired in another way is run whole.
Knows nothing of devices.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from splitray.errors import unsplittable


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLayout:
    """The wiring of one layer: names of its children in their roles, and the residual's factor.

    `whole`: it is run as it is, and all but `tuple_size` has no meaning.
    """

    attention: str = ""
    attention_norm: str | None = None
    attention_post_norm: str | None = None
    ffn: tuple[str, ...] = ()
    ffn_norm: str | None = None
    ffn_post_norm: str | None = None
    parallel: bool = True
    residual_scale: float = 1.0
    tuple_size: int
    """Of what HF's model loop gets of the layer; 0 for a tensor alone."""
    attention_arguments: tuple[tuple[str, str], ...] = ()
    """(name of the attention's argument, name of the layer's argument that it receives)."""
    whole: bool = False

    @property
    def has_post_norm(self) -> bool:
        """Whether a sub-block's sum is normalised before the residual is added."""
        return self.attention_post_norm is not None or self.ffn_post_norm is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layouts:
    """The wiring of a model: of its `different` layers, `which` of them each layer is like, and what is around them.

    `before` and `after` are the names of the decoder's other children with weights: those that run before the layers,
    where tokens are embedded, and behind them, where the head is.
    """

    different: tuple[LayerLayout, ...]
    which: tuple[int, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    streams: int = 1
    """Residuals that go from layer to layer side by side."""

    def of(self, layer: int) -> LayerLayout:
        """The wiring of one layer."""
        return self.different[self.which[layer]]

    @property
    def parallel(self) -> bool:
        """Whether the halves of a layer are one sub-block; all layers are alike in this."""
        return self.different[0].parallel

    @property
    def whole(self) -> bool:
        """Whether layers are run as they are; all layers are alike in this."""
        return self.different[0].whole

    @property
    def has_post_norm(self) -> bool:
        """Whether in some layer a sum is normalised before the residual is added."""
        return any(x.has_post_norm for x in self.different)


@dataclass(frozen=True, slots=True)
class _Call:
    name: str
    module: nn.Module
    inputs: tuple[Any, ...]
    keywords: dict[str, Any]
    output: Tensor

    @property
    def x(self) -> Tensor:
        return self.inputs[0] if self.inputs else self.keywords["hidden_states"]


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, judged by its class name as all of transformers' norms allow."""
    return "norm" in type(module).__name__.lower()


def observe_layer(layer: nn.Module, run: Callable[[], object], *, family: str) -> LayerLayout:
    """Run the model once and read the layer's wiring.

    The layer has random weights, as zeros would make different wirings look alike; `run` runs the model that holds it,
    and `family` is the model type, for messages.

    Raises:
        ModelError: the layer is not a residual sum of one attention and one FFN.
    """
    calls: list[_Call] = []
    whole: list[_Call] = []
    with _watching(layer, calls, whole):
        run()
    outer = whole[0]
    calls = [c for c in calls if not isinstance(c.module, nn.Dropout)]
    norms = [c for c in calls if is_norm(c.module)]
    bodies = [c for c in calls if not is_norm(c.module)]
    what, found = f"the decoder layer of {family}", [c for c in bodies if "att" in c.name]
    if len(found) != 1:
        raise unsplittable(what, "one attention", f"{len(found)} ({[c.name for c in found]})")
    attention = found[0]
    ffn = [c for c in bodies if c is not attention]
    if not ffn:
        raise unsplittable(what, "an FFN after the attention", "none")
    x, z = outer.x, outer.output

    def made(value: Tensor) -> _Call | None:
        return next((c for c in norms if _same(c.output, value)), None)

    def post(value: Tensor) -> _Call | None:
        return next((c for c in norms if _same(c.x, value)), None)

    attention_norm = None if _same(attention.x, x) else made(attention.x)
    if attention_norm is None and not _same(attention.x, x):
        raise unsplittable(what, "attention that reads the layer's input or its norm", "another input")
    ffn_norm = made(ffn[0].x)
    u = (ffn_norm.x if ffn_norm else ffn[0].x).reshape(x.shape)
    parallel = _same(u, x)
    attention_post = post(attention.output)
    if attention_post is ffn_norm:
        attention_post = None
    ffn_post = post(ffn[-1].output)
    a = attention_post.output if attention_post else attention.output
    f = (ffn_post.output if ffn_post else ffn[-1].output).reshape(x.shape)
    first = a + f if parallel else a
    reached = z if parallel else u
    scale = float(((reached - x) * first).sum() / (first * first).sum())
    rest = x + scale * (a + f) if parallel else u + scale * f
    if not _close(reached, x + scale * first) or not _close(z, rest):
        raise unsplittable(what, "x + s * attention and x + s * ffn as the layer's output", "another sum")
    return LayerLayout(
        attention=attention.name,
        attention_norm=attention_norm.name if attention_norm else None,
        attention_post_norm=attention_post.name if attention_post else None,
        ffn=tuple(c.name for c in ffn),
        ffn_norm=ffn_norm.name if ffn_norm else None,
        ffn_post_norm=ffn_post.name if ffn_post else None,
        parallel=parallel,
        residual_scale=1.0 if abs(scale - 1) < 1e-4 else round(scale, 6),
        tuple_size=outer.keywords["__tuple__"],
        attention_arguments=_arguments(layer, outer, attention),
    )


def layer_arguments(layer: nn.Module) -> tuple[str, ...]:
    """Names of a layer's positional arguments after the hidden states."""
    parameters = inspect.signature(type(layer).forward).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in kinds)[2:]


def _arguments(layer: nn.Module, outer: _Call, attention: _Call) -> tuple[tuple[str, str], ...]:
    given = dict(zip(layer_arguments(layer), outer.inputs[1:], strict=False)) | outer.keywords
    signature = inspect.signature(type(attention.module).forward)
    names = [n for n in list(signature.parameters)[1:] if n != "hidden_states"]
    passed = dict(zip(names, attention.inputs[1:], strict=False)) | attention.keywords
    pairs = []
    for name, value in passed.items():
        if name == "hidden_states":
            continue
        known = [k for k, v in given.items() if v is value and v is not None and not isinstance(v, bool)]
        source = name if name in given else known[0] if known else None
        if source is not None:
            pairs.append((name, source))
    return tuple(pairs)


@contextmanager
def _watching(layer: nn.Module, calls: list[_Call], whole: list[_Call]) -> Iterator[None]:
    def watch(name: str, sink: list[_Call]) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            keywords = dict(kwargs)
            if sink is whole:
                keywords["__tuple__"] = len(output) if isinstance(output, tuple | list) else 0
            inputs = tuple(a.clone() if i == 0 and isinstance(a, Tensor) else a for i, a in enumerate(args))
            sink.append(_Call(name, module, inputs, keywords, first.clone()))

        return hook

    handles = [m.register_forward_hook(watch(n, calls), with_kwargs=True) for n, m in layer.named_children()]
    handles.append(layer.register_forward_hook(watch("layer", whole), with_kwargs=True))
    with hooked(handles):
        yield


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Remove hooks of modules behind a block, however it ends."""
    made = list(handles)
    try:
        yield
    finally:
        for handle in made:
            handle.remove()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1), b.reshape(-1))


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4 * float(a.abs().max()))
