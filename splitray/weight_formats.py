"""The formats in which weights may be held: their names, what they take, and where a matrix may be cut in them.

Knows no arrays: planners read it.
"""

from dataclasses import dataclass
from functools import cache

from splitray.errors import InputError, did_you_mean

NUM_BLOCKS = 16
"""Into so many parts the columns of an FFN are cut where sums are made in fixed blocks."""
ROWS = 8
"""Output rows of a quantised matrix are cut at multiples of this: elsewhere kernels compute other bits."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """`bits` of one weight, and how many inputs of a row share a scale; a group of 0: plain floats.

    `resident_bits` is what a weight takes in memory with all that its kernel keeps beside it (measured: MatMulNBits
    of onnxruntime keeps float32 scales twice and sums of blocks).
    """

    name: str
    bits: int
    group: int = 0
    resident_bits: float = 0.0

    @property
    def table(self) -> "WeightFormat":
        """That of embedding and head: 8 bits beside 4, where rounding them cost more than all else together."""
        return FORMATS["int8"] if self.bits < 8 else self

    @property
    def is_held(self) -> bool:
        """Whether linears keep weights in another form than that of the rows they multiply."""
        return self.name != "float32"

    @property
    def is_quantised(self) -> bool:
        """Whether weights share scales."""
        return self.group > 0

    def group_of(self, inputs: int) -> int:
        """The largest group of at most the format's that divides so many inputs (16 where none does)."""
        return next((g for g in (128, 64, 32) if g <= self.group and inputs % g == 0), 16)

    @cache  # noqa: B019 - there are as many formats as names
    def ffn_cuts(self, columns: int) -> tuple[int, ...]:
        """The borders at which the columns of an FFN may be cut: those of `NUM_BLOCKS` nearly equal runs of groups.

        Empty for plain floats, which are cut anywhere.
        """
        if not self.is_quantised:
            return ()
        group = self.group_of(columns)
        groups = -(-columns // group)
        borders = {min(columns, round(i * groups / NUM_BLOCKS) * group) for i in range(NUM_BLOCKS + 1)}
        return tuple(sorted(borders | {columns}))


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """How a checkpoint stores most of its weights: the name of the format that they have, or that comes closest.

    `resident_bits` is the mean size of a weight where devices hold whole numbers just as they are stored; None where
    numbers are made of what is stored.
    """

    format: str
    resident_bits: float | None = None


def resident_bits(bits: int, group: int, *, minima: bool = False) -> float:
    """Of a weight of so many bits in groups: a scale takes three float32 in the kernel, a minimum two (measured)."""
    return bits + (160 if minima else 96) / group


AUTO_WEIGHTS = "auto"
"""As the checkpoint stores them."""
FORMATS = {
    f.name: f
    for f in (
        WeightFormat("float32", 32, resident_bits=32),
        WeightFormat("bfloat16", 16, resident_bits=16),
        WeightFormat("float16", 16, resident_bits=16),
        WeightFormat("int8", 8, 32, resident_bits=11),
        WeightFormat("int4", 4, 32, resident_bits=7.2),
        WeightFormat("int4/128", 4, 128, resident_bits=4.8),
    )
}

BEST_WEIGHTS = "best"
"""As a planner finds best for each device."""
WEIGHTS = (AUTO_WEIGHTS, *FORMATS)


def as_format(name: str) -> WeightFormat:
    """The format of this name; `auto` is decided before, where a checkpoint is read.

    Raises:
        InputError: there is none.
    """
    if name in FORMATS:
        return FORMATS[name]
    known = (*WEIGHTS, BEST_WEIGHTS)
    remedy = f"use one of them{did_you_mean(name.lower(), known)}"
    raise InputError("weights", expected=f"one of {', '.join(known)}", actual=name or "nothing", remedy=remedy)
