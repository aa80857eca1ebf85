"""How fast this process multiplies and copies, the way the engine does it. Knows no model and no placement.

The matrices lie as the lean loop has them (model/lean/linears.py): [inputs, outputs] in torch's memory, for OpenBLAS.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch

from splitray.model.split_layer import Array
from splitray.runtime.wire.answers import Speeds

_HIDDEN, _COLUMNS, _ROWS = 768, 2048, 512  # of the bench's llama, and a chunk of a prompt
_COPIED_BYTES = 1 << 26
SECONDS = 0.3


def speeds(*, cold_bytes: int, seconds: float = SECONDS) -> Speeds:
    """Rates of one core, each measured for `seconds`.

    Args:
        cold_bytes: what the GEMV cycles through; several times the cache, so that weights come from memory.
        seconds: for each rate.
    """
    gemv, gemv_bytes = cold_ffn(cold_bytes)
    prompt, weight = _matrix(_ROWS, _HIDDEN), _matrix(_HIDDEN, 2 * _COLUMNS)
    source, target = (_matrix(1, _COPIED_BYTES // 4) for _ in range(2))
    return Speeds(
        gemv_bytes_per_s=gemv_bytes / _median_s(gemv, seconds),
        gemm_flops_per_s=2 * _ROWS * weight.size / _median_s(lambda: prompt @ weight, seconds),
        copy_bytes_per_s=_COPIED_BYTES / _median_s(lambda: np.copyto(target, source), seconds),
    )


def cold_ffn(cold_bytes: int) -> tuple[Callable[[], None], int]:
    """One row through the matrices of an FFN, other ones each time; and the bytes that it reads."""
    wide, narrow = (_HIDDEN, 2 * _COLUMNS), (_COLUMNS, _HIDDEN)  # gate and up, then down
    num_bytes = 4 * (wide[0] * wide[1] + narrow[0] * narrow[1])
    turn = itertools.cycle([(_matrix(*wide), _matrix(*narrow)) for _ in range(max(1, cold_bytes // num_bytes))])
    row, hidden = np.ones(_HIDDEN, np.float32), np.ones(_COLUMNS, np.float32)

    def work() -> None:
        up, down = next(turn)
        row @ up
        hidden @ down

    return work, num_bytes


def _matrix(rows: int, columns: int) -> Array:
    return torch.ones(rows, columns).numpy()


def _median_s(work: Callable[[], object], seconds: float) -> float:
    work()  # the first touch costs page faults
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return float(np.median(times))
