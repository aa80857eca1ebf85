"""Which positions a family gives to the tokens of a padded batch where its caller gives none.

Most count all that comes before a token; some (opt) only what is not masked.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig

from splitray.errors import InputError
from splitray.model.probe import probe_model


def counts_masked(config: PretrainedConfig) -> bool:
    """Whether masked tokens count, as a small random model of the family shows.

    Raises:
        InputError: the family does something else.
    """
    probe = probe_model(config)
    ids_BT = torch.arange(3, 13).reshape(2, 5)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, :3] = 0

    @torch.inference_mode()
    def logits(position_ids: Tensor | None) -> Tensor:
        found: Tensor = probe(input_ids=ids_BT, attention_mask=mask_BT, position_ids=position_ids).logits
        return found[mask_BT == 1]

    given, all_BT = logits(None), torch.arange(5).expand(2, -1)
    for counts, position_ids in ((True, all_BT), (False, unmasked_positions(mask_BT))):
        if torch.allclose(given, logits(position_ids), atol=1e-4 * float(given.abs().max())):
            return counts
    raise InputError("position_ids", expected="positions, as this family has its own way to count them",
                     actual="a mask alone", remedy="give position_ids with the mask")  # fmt: skip


def unmasked_positions(mask_BT: Tensor) -> Tensor:
    """Positions by what is not masked; -1 where a token is masked."""
    mask_BT = mask_BT.long()
    return mask_BT.cumsum(-1) * mask_BT - 1
