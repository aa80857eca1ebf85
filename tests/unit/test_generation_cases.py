"""Each way to generate that docs/generation.md lists: the same as in transformers, or refused as it says."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from families import family_model
from generation_cases import FAMILIES, Case, every, page
from splits import split

from splitray.errors import InputError
from splitray.runtime import hf
from splitray.runtime.hf import SplitModel

CASES = [case for _, case in every()]
PAGE = Path(__file__).parents[2] / "docs" / "generation.md"


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model = family_model(request.param)
    with split(model, devices=3, seed=3) as engine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "read_config", lambda _: copy.deepcopy(model.config))
        with torch.no_grad():
            yield model, SplitModel(engine)


def same(a: Any, b: Any) -> bool:
    """Ids and texts to the letter, scores as closely as sums in another order allow."""
    if isinstance(a, torch.Tensor):
        close = a.shape == b.shape and a.dtype == b.dtype
        return close and bool(torch.allclose(a, b, atol=1e-4, rtol=1e-4) if a.is_floating_point() else (a == b).all())
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.thin(4, each="pair")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=[c.name.replace("`", "") for c in CASES])
def test_it_is_the_same_as_in_transformers_or_refused(pair, case: Case):
    whole, parts = pair
    if case.outcome == "refused":
        with pytest.raises(InputError, match=case.says):
            case.run(parts, (whole,))
    elif case.outcome == "not there":
        for model in (whole, parts):
            with pytest.raises(ValueError, match=case.says):
                case.run(model, (whole,))
    else:
        assert same(case.run(whole, (whole,), whole=True), case.run(parts, (whole,)))


def test_the_page_is_what_is_tested():
    assert PAGE.read_text(encoding="utf-8") == page()
