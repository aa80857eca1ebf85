"""Chen et al. (arXiv 2406.02616): what the user's device computes for the first p layers, eq. (2), and eq. (5).

The formulas are STATED, their corrections are ours (docs/equations.md, section 3). The channel as it is run is
`splitray.channel`; the reward is not here. The authors' released code has no licence and was not used.
"""

import enum

from splitray.arch import ModelArch
from splitray.channel import Nakagami


class ChenErrata(enum.Flag):
    """What the text prints (STATED), one switch each, all off in `CORRECTED`."""

    HEAD_SHARE = enum.auto()  # C2: QKV and attention over kappa, one head's part beside a whole projection and FFN
    MULTIPLY_ADDS = enum.auto()  # C2: a multiply-add counts once
    PLAIN_MLP = enum.auto()  # C4: full K and V and two maps of 4 d for any model, SwiGLU too
    PER_SECOND = enum.auto()  # C3: a count is called a rate, which is right only for steps of one second
    SQUARED_OMEGA = enum.auto()  # C1: eq. (5)'s exponent has omega^2, so that it is no probability


AS_PRINTED = ~ChenErrata(0)
CORRECTED = ChenErrata(0)


def layer_operations(arch: ModelArch, *, tokens: int, errata: ChenErrata = CORRECTED) -> float:
    """FLOPs(L_1) of a forward pass over n = d_in `tokens` without a cache.

    Printed: 3 n d^2 / kappa + 2 n^2 d / kappa + 9 n d^2, d = d_mid, kappa heads. Corrected: 24 n d^2 + 4 n^2 d (E1.6)
    for a plain MLP of 4 d, and 8 n d^2 + 4 n^2 d + 6 n d d_ff for SwiGLU, which is what `splitray.cost` counts.
    """
    n, d = tokens, arch.hidden_dim
    plain = ChenErrata.PLAIN_MLP in errata
    queries = arch.num_heads * arch.head_dim
    qkv = n * d * (3 * d if plain else queries + 2 * arch.num_kv_heads * arch.head_dim)
    attention = 2 * n * n * (d if plain else queries)
    out = n * d * (d if plain else queries)
    ffn = 8 * n * d * d if plain else n * arch.ffn_dim * arch.ffn_unit_params
    share = arch.num_heads if ChenErrata.HEAD_SHARE in errata else 1
    return ((qkv + attention) / share + out + ffn) * (1 if ChenErrata.MULTIPLY_ADDS in errata else 2)


def ue_operations(arch: ModelArch, num_layers: int, *, tokens: int, errata: ChenErrata = CORRECTED) -> float:
    """C_UE(p), eq. (2): p equal layers, a count."""
    return num_layers * layer_operations(arch, tokens=tokens, errata=errata)


def ue_flops_per_s(
    arch: ModelArch, num_layers: int, *, tokens: int, step_s: float, errata: ChenErrata = CORRECTED
) -> float:
    """C_UE(p) as the rate that the text calls it: the count over the time of a step, or the count itself (C3)."""
    count = ue_operations(arch, num_layers, tokens=tokens, errata=errata)
    return count if ChenErrata.PER_SECOND in errata else count / step_s


def packet_loss(m: float, omega: float, threshold: float, errata: ChenErrata = CORRECTED) -> float:
    """P_loss, eq. (5): the chance that a Nakagami-m gain with E[h^2] = omega lies below the threshold.

    As printed the integral tends to omega^m and not to 1.
    """
    from scipy.special import gammainc

    if ChenErrata.SQUARED_OMEGA in errata:
        return float(omega**m * gammainc(m, m * threshold**2 / omega**2))
    return Nakagami(m=m, omega=omega, threshold=threshold).loss
