"""Norms of q and k over ALL heads (OLMo 2) when each device has some heads: one small sum over the holders.

Both sums of squares travel together, so that there is one exchange and not two. Knows only the attention module.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def share_norm_sums(
    attention: Any, sum_over_holders: Callable[[Tensor], Tensor], *, q_features: int, k_features: int
) -> None:
    """Make a sliced attention normalise q and k as the whole one does.

    `attention` has q_proj, k_proj, q_norm and k_norm on this device's heads; `sum_over_holders` sums a float32 tensor
    [..., 2] over the devices that hold heads. The features are those of the whole q and k.
    """
    ahead = _Ahead()
    q_proj, k_proj = attention.q_proj, attention.k_proj
    attention.q_proj = ProjectBoth(q_proj, k_proj, sum_over_holders, ahead)
    attention.k_proj = _Stored(ahead)
    attention.q_norm = SharedRmsNorm(attention.q_norm, ahead, which=0, features=q_features)
    attention.k_norm = SharedRmsNorm(attention.k_norm, ahead, which=1, features=k_features)


@contextmanager
def alone(attention: nn.Module) -> Iterator[None]:
    """Let an attention be tried on this device without a message to another: its norms are of what it has."""
    both = getattr(attention, "q_proj", None)
    if not isinstance(both, ProjectBoth):
        yield
        return
    total, both.total = both.total, lambda sums: sums
    try:
        yield
    finally:
        both.total = total


class _Ahead:
    """What q_proj computes ahead for k_proj and the norms of the same call."""

    k: Tensor
    sums: Tensor


class ProjectBoth(nn.Module):
    """Stands for q_proj: projects to k too, and sums the squares of both over the holders by `total`."""

    def __init__(self, q_proj: nn.Module, k_proj: nn.Module, total: Callable[[Tensor], Tensor], ahead: _Ahead) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.total, self.ahead = q_proj, k_proj, total, ahead

    def forward(self, x_BTD: Tensor) -> Tensor:
        """The projection to q."""
        q, k = self.q_proj(x_BTD), self.k_proj(x_BTD)
        squares = torch.stack([q.float().pow(2).sum(-1), k.float().pow(2).sum(-1)], dim=-1)
        self.ahead.k, self.ahead.sums = k, self.total(squares)
        return q  # type: ignore[no-any-return]


class _Stored(nn.Module):
    def __init__(self, ahead: _Ahead) -> None:
        super().__init__()
        self.ahead = ahead

    def forward(self, _: Tensor) -> Tensor:
        return self.ahead.k


class SharedRmsNorm(nn.Module):
    """Stands for q_norm or k_norm: `features` are those of all heads, on whatever devices."""

    def __init__(self, norm: Any, ahead: _Ahead, *, which: int, features: int) -> None:
        super().__init__()
        self.norm: Any
        self.norm, self.ahead, self.which, self.features = norm, ahead, which, features
        self.eps = float(getattr(norm, "variance_epsilon", getattr(norm, "eps", 1e-6)))

    def forward(self, x: Tensor) -> Tensor:
        """The norm, by the sums that came with the projection."""
        mean = self.ahead.sums[..., self.which : self.which + 1] / self.features
        normal = x.float() * torch.rsqrt(mean + self.eps)
        return (self.norm.weight * normal).to(x.dtype)
