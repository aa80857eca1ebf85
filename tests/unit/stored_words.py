"""Whole numbers in words of 32 bits, as the libraries that quantise models pack them."""

import numpy as np
import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def words(numbers, bits, order=None):
    """Along the last axis, as the libraries' packing loops do it."""
    per = 32 // bits
    padded = np.pad(numbers, [(0, 0), (0, -numbers.shape[1] % per)]).astype(np.uint32)
    packed = np.zeros((len(padded), padded.shape[1] // per), np.uint32)
    for column in range(packed.shape[1]):
        for i, at in enumerate(order or range(per)):
            packed[:, column] |= padded[:, column * per + at] << np.uint32(bits * i)
    return torch.from_numpy(packed.view(np.int32))
