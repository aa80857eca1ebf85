"""The surrogate of Chen et al.: an MLP that tells the relative perplexity of a channel at a cut or a placement.

Input: the features of quality/features.py, and a switch for each model it was fitted to. Output: the logarithm of what
relative perplexity (no unit) rises by and `FLOOR`, so that small rises, between which policies choose, are told well
beside large ones. A perplexity counts as at most `CEILING`: what loses more is of no use, however much more.
The paper's maps (loss, p) to a reward of unknown unit (E14) by two layers of 128 ReLU;
this one has two of `hidden` tanh. Fitting takes torch, predicting numpy only.

Two files: `NAME.safetensors` holds float32 `weight_0`, `bias_0`, ... and the inputs' `mean` and `scale`;
`NAME.json`, the card, holds the names of the inputs, the models, the unit, what it was fitted to, the metrics on
held-out rows, and the SHA-256 of the tensors' file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from safetensors.numpy import save as tensors_bytes

from splitray.arrays import Floats
from splitray.card import chained, read_card
from splitray.channel import NoisyChannel, as_channel
from splitray.codecs import Codec
from splitray.errors import InputError
from splitray.quality.features import (
    CHANNEL_FEATURES,
    PLACE_FEATURES,
    PlaceFeatures,
    channel_features,
    place_features,
)
from splitray.quality.table import QualityTable
from splitray.results import write_whole
from splitray.user_file import UserFile

FORMAT = 2
CEILING, FLOOR = 4.0, 0.1
UNIT = f"relative perplexity: with the channel over the exact model's, 1 is no loss, {CEILING:g} or more counts as that"
HIDDEN, STEPS, FOLDS = 32, 2000, 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One thing to learn from: what was asked, and the relative perplexity that was measured."""

    model: str
    place: PlaceFeatures
    channel: NoisyChannel | None
    codec: Codec
    relative_perplexity: float

    @property
    def is_loss_at_a_cut(self) -> bool:
        """Whether this is the paper's question: elements lost at one cut, exact values."""
        channel = self.channel
        plain = channel is not None and replace(channel, loss=0.0, seed=0) == NoisyChannel()
        return plain and self.codec == "none" and self.place.states == 1 and not self.place.partials


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """Errors of relative perplexities (no unit) on rows that were not fitted."""

    rows: int
    mse: float
    mae: float
    r2: float
    unit: str = UNIT


def records_of(table: QualityTable) -> list[Record]:
    """The rows of a measured table as records to fit to."""
    return [
        Record(
            model=table.model,
            place=table.places[row.at],
            channel=as_channel(row.channel),
            codec=row.codec,
            relative_perplexity=table.relative(row),
        )
        for row in table.rows
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Surrogate:
    """See above. `weights` are [(weight [in, out], bias [out]), ...].

    `metrics` are of the cross-validation: over `all` records, over those of `loss_at_cut`, the paper's question, and
    over those of `placements` with partial sums.
    """

    models: tuple[str, ...]
    mean: Floats
    scale: Floats
    weights: tuple[tuple[Floats, Floats], ...]
    metrics: Mapping[str, Metrics] = field(default_factory=dict)

    @staticmethod
    def fit(
        records: Sequence[Record], *, hidden: int = HIDDEN, steps: int = STEPS, seed: int = 0, folds: int = FOLDS
    ) -> Surrogate:
        """Fit all records, and tell by cross-validation how well such a fit does on rows that it has not seen.

        `hidden` is the width of the two layers, and each of the `steps` is over all records. Equal questions fall into
        one of the `folds`; 0 leaves the cross-validation out. The seed is that of the first weights and of the folds.

        Raises:
            InputError: too few records, or a perplexity that is no positive number.
        """
        inputs, targets, models = _arrays(records)
        metrics = cross_validate(records, hidden=hidden, steps=steps, seed=seed, folds=folds) if folds else {}
        mean, scale, weights = _trained(inputs, targets, hidden, steps, seed)
        return Surrogate(models=models, mean=mean, scale=scale, weights=weights, metrics=metrics)

    def predict(self, model: str, place: PlaceFeatures, channel: NoisyChannel | None, codec: Codec = "none") -> float:
        """The relative perplexity to expect; within 1 and `CEILING`, and exactly 1 where nothing is lost.

        Raises:
            InputError: it was not fitted to this model.
        """
        if channel is None and codec == "none":
            return 1.0
        row = [*channel_features(channel, codec), *place_features(place), *self._switches(model)]
        return float(self.relative(np.array([row]))[0])

    def relative(self, inputs_NF: Floats) -> Floats:
        """Relative perplexities of many questions at once: rows as `question` gives them."""
        return _relative(_forward(self.weights, (inputs_NF - self.mean) / self.scale))

    def question(self, model: str, place: PlaceFeatures, channel: NoisyChannel | None, codec: Codec = "none") -> Floats:
        """The input row of `relative` for one question: features of place, channel, codec and model."""
        return np.array([*channel_features(channel, codec), *place_features(place), *self._switches(model)])

    def _switches(self, model: str) -> list[float]:
        if model not in self.models:
            expected, remedy = f"one of {list(self.models)}", "fit a surrogate to a table of that model"
            raise InputError("model of the surrogate", expected=expected, actual=model, remedy=remedy)
        return [float(model == m) for m in self.models]

    def save(self, path: str | Path, *, about: str = "") -> tuple[Path, Path]:
        """Write `path` with the endings .safetensors and .json; returns both."""
        tensors_at, card_at = Path(f"{path}.safetensors"), Path(f"{path}.json")
        tensors = {"mean": self.mean, "scale": self.scale}
        for i, (weight, bias) in enumerate(self.weights):
            tensors |= {f"weight_{i}": weight, f"bias_{i}": bias}
        data = tensors_bytes({k: np.ascontiguousarray(v, np.float32) for k, v in tensors.items()})
        write_whole(tensors_at, data)
        card = {
            "format": FORMAT,
            "unit": UNIT,
            "about": about,
            "inputs": [*CHANNEL_FEATURES, *PLACE_FEATURES, *(f"is {m}" for m in self.models)],
            "models": list(self.models),
            "layers": len(self.weights),
            "metrics": {name: asdict(m) for name, m in self.metrics.items()},
            "sha256": hashlib.sha256(data).hexdigest(),
        }
        write_whole(card_at, json.dumps(card, indent=1) + "\n")
        return tensors_at, card_at

    @staticmethod
    def load(path: str | Path) -> Surrogate:
        """Read what `save` wrote under this path.

        Raises:
            InputError: a file is missing, damaged, or was written for other features.
        """
        remedy = "fit it again with `python -m splitray.profiling.fit_quality`"
        file = UserFile(Path(f"{path}.json"), "surrogate", remedy)
        card, tensors = read_card(file, Path(f"{path}.safetensors"))
        with file.understood():
            models, inputs = tuple(map(str, card["models"])), card["inputs"]
            expected = [*CHANNEL_FEATURES, *PLACE_FEATURES, *(f"is {m}" for m in models)]
            if card["format"] != FORMAT or inputs != expected:
                raise file.wrong(f"format {FORMAT} with the inputs {expected}", inputs)
            metrics = {name: msgspec.convert(m, Metrics) for name, m in card["metrics"].items()}
            values = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
            weights = tuple((values[f"weight_{i}"], values[f"bias_{i}"]) for i in range(card["layers"]))
            scales = [values[name].shape for name in ("mean", "scale")]
            if not chained(weights, len(inputs)) or scales != [(len(inputs),)] * 2 or weights[-1][0].shape[1] != 1:
                raise file.wrong("layers from its inputs to one value", [w.shape for w, _ in weights])
            return Surrogate(
                models=models, mean=values["mean"], scale=values["scale"], weights=weights, metrics=metrics
            )


def shipped_surrogate() -> Surrogate:
    """The surrogate that ships: fitted to the measured table of the shipped model."""
    return Surrogate.load(Path(__file__).parent / "shipped" / "surrogate")


def cross_validate(
    records: Sequence[Record], *, hidden: int = HIDDEN, steps: int = STEPS, seed: int = 0, folds: int = FOLDS
) -> dict[str, Metrics]:
    """Fit on all folds but one and score that one, for each: see `Surrogate.metrics`.

    Raises:
        InputError: see `Surrogate.fit`.
    """
    inputs, targets, _ = _arrays(records)
    questions = {row: i for i, row in enumerate(sorted({tuple(r) for r in inputs.tolist()}))}
    if len(questions) < folds:
        expected = f"at least {folds} different questions"
        raise InputError("records of the surrogate", expected=expected, actual=len(questions), remedy="measure more")
    shuffled = np.random.default_rng(seed).permutation(len(questions))
    fold = np.array([shuffled[questions[tuple(row)]] % folds for row in inputs.tolist()])
    told = np.empty_like(targets)
    for held_out in range(folds):
        seen = fold != held_out
        mean, scale, weights = _trained(inputs[seen], targets[seen], hidden, steps, seed)
        told[~seen] = _forward(weights, (inputs[~seen] - mean) / scale)
    told_relative, measured = _relative(told), _relative(targets)
    groups = {
        "all": np.full(len(records), True),
        "loss_at_cut": np.array([r.is_loss_at_a_cut for r in records]),
        "placements": np.array([r.place.partials > 0 for r in records]),
    }
    return {name: metrics_of(told_relative[of], measured[of]) for name, of in groups.items() if of.any()}


def metrics_of(told: Floats, measured: Floats) -> Metrics:
    """Errors of predicted relative perplexities against measured ones."""
    off = told - measured
    spread = float(np.square(measured - measured.mean()).sum())
    return Metrics(
        rows=len(off),
        mse=float(np.square(off).mean()),
        mae=float(np.abs(off).mean()),
        r2=1 - float(np.square(off).sum()) / spread if spread else math.nan,
    )


def _arrays(records: Sequence[Record]) -> tuple[Floats, Floats, tuple[str, ...]]:
    if not records:
        raise InputError("records of the surrogate", expected="at least one", actual="none", remedy="measure some")
    models = tuple(dict.fromkeys(r.model for r in records))
    inputs = [
        [*channel_features(r.channel, r.codec), *place_features(r.place), *(float(r.model == m) for m in models)]
        for r in records
    ]
    relative = np.array([r.relative_perplexity for r in records], np.float64)
    if not (np.isfinite(relative) & (relative > 0)).all():
        expected, remedy = "relative perplexities above 0", "leave out what is none"
        raise InputError("records of the surrogate", expected=expected, actual=relative.tolist(), remedy=remedy)
    return np.array(inputs, np.float64), np.log(np.clip(relative, 1.0, CEILING) - 1 + FLOOR), models


def _trained(
    inputs: Floats, targets: Floats, hidden: int, steps: int, seed: int
) -> tuple[Floats, Floats, tuple[tuple[Floats, Floats], ...]]:
    """Mean and scale of the inputs, and weights of least squared error."""
    import torch
    from torch import nn

    mean = inputs.mean(0)
    scale = np.where(inputs.std(0) > 1e-9, inputs.std(0), 1.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(inputs.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1)
        )
    x = torch.from_numpy((inputs - mean) / scale).float()
    y = torch.from_numpy(targets).float()
    weight = torch.exp(y)  # a logarithm that is off by e moves a rise r by about r e, and large ones shall count more
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=max(2, steps))
    with torch.enable_grad():
        for _ in range(steps):
            loss = (weight * (net(x).squeeze(-1) - y).square()).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    layers = [m for m in net if isinstance(m, nn.Linear)]
    weights = tuple(
        (m.weight.detach().numpy().T.astype(np.float64), m.bias.detach().numpy().astype(np.float64)) for m in layers
    )
    return mean, scale, weights


def _relative(logarithms: Floats) -> Floats:
    return np.clip(1 + np.exp(logarithms) - FLOOR, 1.0, CEILING)


def _forward(weights: tuple[tuple[Floats, Floats], ...], x_NF: Floats) -> Floats:
    for weight, bias in weights[:-1]:
        x_NF = np.tanh(x_NF @ weight + bias)
    weight, bias = weights[-1]
    return (x_NF @ weight + bias)[:, 0]
