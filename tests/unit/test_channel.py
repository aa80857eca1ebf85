"""The channel: its arithmetic against closed forms, and what it does to a model split over a wire."""

from __future__ import annotations

import itertools
import math
from zlib import crc32

import msgspec
import numpy as np
import pytest
import torch
from families import family_model
from scipy.integrate import quad
from scipy.special import gammainc, gammaincinv
from scipy.stats import kstest
from splits import greedy, report_of, split

from splitray.channel import Nakagami, NoisyChannel, Receiver, as_channel
from splitray.errors import InputError
from splitray.model.reading import read_arch
from splitray.papers.chen import ChenErrata, packet_loss
from splitray.placement import LayerPlacement, Placement, Shares
from splitray.route import compile_route
from splitray.runtime.engine.stepping import Forward
from splitray.runtime.launch import launch_engine
from splitray.runtime.sampling import Sampling
from splitray.runtime.wire.packing import pack
from splitray.topology import Topology

PROMPT = [5, 17, 60, 3, 44, 44, 8, 91, 12]
LOSSES = [  # (m, omega, threshold, loss): docs/equations.md E3.2
    (1, 1, 0.3, 0.08607), (1, 1, 0.5, 0.22120), (1, 2, 0.3, 0.04400), (1, 2, 0.5, 0.11750), (2, 1, 0.3, 0.01438),
    (2, 1, 0.5, 0.09020), (0.5, 1, 0.3, 0.23582), (0.5, 1, 0.5, 0.38292), (3, 1, 0.3, 0.00268), (3, 1, 0.5, 0.04051),
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def noisy(text: str, *, seed: int = 0) -> NoisyChannel:
    """The channel of a text that means one."""
    channel = as_channel(text, seed=seed)
    assert channel is not None
    return channel


def received(text: str, x: np.ndarray, *, seed: int = 0, **options) -> np.ndarray:
    return Receiver(noisy(text, seed=seed), 1).receive(x, **options)


def values(batch: int = 1, positions: int = 400, hidden: int = 128, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scale = 10 ** rng.uniform(-2, 2, (batch, positions, 1))
    return (rng.standard_normal((batch, positions, hidden)) * scale).astype(np.float32)


# --- fading and loss in closed form


def threshold_of(m: float, omega: float, loss: float) -> float:
    """The threshold that loses this share: the inverse of the loss in closed form."""
    return math.sqrt(float(gammaincinv(m, loss)) * omega / m)


@pytest.mark.parametrize(("m", "omega", "threshold", "loss"), LOSSES)
def test_the_loss_of_nakagami_fading_and_its_inverse(m, omega, threshold, loss):
    assert Nakagami(m=m, omega=omega, threshold=threshold).loss == pytest.approx(loss, abs=1e-5)
    assert threshold_of(m, omega, loss) == pytest.approx(threshold, rel=2e-3)
    assert packet_loss(m, omega, threshold) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("m", "loss", "threshold"), [(1, 0.1, 0.3246), (1, 0.3, 0.5972), (2, 0.1, 0.5157), (2, 0.3, 0.7407)]
)
def test_the_threshold_that_loses_so_much(m, loss, threshold):
    assert threshold_of(m, 1, loss) == pytest.approx(threshold, abs=1e-4)


@pytest.mark.parametrize(("m", "omega"), [(1, 2), (2, 2), (1, 0.5), (0.7, 1)])
def test_eq_5_as_printed_is_no_probability(m, omega):
    def printed(h: float) -> float:
        prefactor = 2 * m**m * h ** (2 * m - 1) / (math.gamma(m) * omega**m)
        return prefactor * math.exp(-m * h * h / omega**2)

    whole = packet_loss(m, omega, 60.0, ChenErrata.SQUARED_OMEGA)
    assert whole == pytest.approx(quad(printed, 0, 60)[0], rel=1e-6) == pytest.approx(omega**m)
    assert packet_loss(m, omega, 4 * math.sqrt(omega)) < 1
    assert packet_loss(m, omega, 0.5, ChenErrata.SQUARED_OMEGA) == pytest.approx(quad(printed, 0, 0.5)[0], rel=1e-6)


@pytest.mark.parametrize(("m", "omega"), [(0.5, 1), (1, 1), (1, 2), (3, 0.5)])
def test_gains_have_the_density_of_eq_4(m, omega):
    fading = Nakagami(m=m, omega=omega, threshold=0.4)
    h = fading.gains(np.random.default_rng(3), (40_000,))
    error = omega / math.sqrt(m * len(h))  # of the mean of h^2, whose variance is omega^2 / m
    assert abs(np.square(h).mean() - omega) < 3 * error
    assert kstest(h, lambda t: gammainc(m, m * t**2 / omega)).pvalue > 0.01
    assert abs((h < 0.4).mean() - fading.loss) < 4 * math.sqrt(fading.loss / len(h))


# --- what arrives


def test_a_sigma_is_the_same_for_weak_and_strong_tokens():
    x = values(positions=2000)
    noise = received("sigma:0.7", x) - x
    assert noise.std(-1).mean() == pytest.approx(0.7, rel=0.02)
    assert abs(np.corrcoef(noise.std(-1).ravel(), np.abs(x).mean(-1).ravel())[0, 1]) < 0.1


@pytest.mark.parametrize("snr_db", [-3.0, 0.0, 10.0, 30.0])
def test_noise_has_the_ratio_that_was_set_for_every_token_alike(snr_db):
    x = values(positions=4000)
    noise = received(f"awgn:{snr_db}", x) - x
    ratio = np.square(x).mean(-1) / np.square(noise).mean(-1)
    assert 10 * math.log10(np.square(x / np.sqrt(np.square(x).mean(-1, keepdims=True))).mean()
                           / (1 / ratio).mean()) == pytest.approx(snr_db, abs=0.1)  # fmt: skip
    assert 10 * np.log10(ratio).std() < 1  # tokens of any norm: 128 draws each


@pytest.mark.parametrize(
    ("text", "together"),
    [("loss:0.2", 1), ("loss:0.2,unit=packet:64", 16), ("loss:0.2,unit=packet:160", 40), ("loss:0.2,unit=token", 128),
     ("nakagami:1,1,0.4724", 1), ("nakagami:2,1,0.6421,unit=token", 128)],
)  # fmt: skip
def test_so_much_is_lost_and_what_belongs_together_goes_together(text, together):
    x = np.ones((2, 2000, 128), np.float32)
    lost = received(text, x) == 0
    runs = [lost[..., at : at + together] for at in range(0, 128, together)]
    assert all((run == run[..., :1]).all() for run in runs)
    units = np.stack([run[..., 0] for run in runs])
    assert abs(units.mean() - 0.2) < 4 * math.sqrt(0.16 / units.size)
    if units.shape[0] > 1:
        assert abs(np.corrcoef(units[0].ravel(), units[1].ravel())[0, 1]) < 0.08


def test_a_packet_holds_as_many_values_as_the_codec_packs_into_it():
    lost = received("loss:0.3,unit=packet:32", np.ones((1, 3000, 128), np.float32), value_bytes=1.03) == 0
    assert all((lost[..., at : at + 31] == lost[..., at : at + 1]).all() for at in range(0, 124, 31))
    assert (lost[..., 0] != lost[..., 31]).any()


@pytest.mark.parametrize("burst", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("positions", [1, 500])
def test_bursts_have_their_length_and_the_same_loss_also_over_many_messages(burst, positions):
    receiver = Receiver(noisy(f"loss:0.3,unit=token,burst={burst}"), 1)
    x = np.ones((1, positions, 8), np.float32)
    lost = np.concatenate([receiver.receive(x, fresh=False)[0, :, 0] == 0 for _ in range(40_000 // positions)])
    runs = [len(list(run)) for bad, run in itertools.groupby(lost) if bad]
    assert np.mean(runs) == pytest.approx(burst, rel=0.1)
    assert lost.mean() == pytest.approx(0.3, abs=0.02 * math.sqrt(burst))


def test_the_same_seed_loses_the_same_and_more_loss_only_adds_to_it():
    x = values()
    few, again, many = received("loss:0.1", x), received("loss:0.1", x), received("loss:0.3", x)
    assert (few == again).all() and not (received("loss:0.1", x, seed=1) == few).all()
    assert ((few == 0) <= (many == 0)).all()
    other = Receiver(noisy("loss:0.1"), 2).receive(x)
    assert not (other == few).all()


def test_fills_by_hand():
    x = np.arange(1, 13, dtype=np.float32).reshape(1, 3, 4)
    lost = received("loss:0.5", x, seed=5) == 0
    assert 0 < lost.sum() < 12
    last, mean, scaled = (received(f"loss:0.5,{option}", x, seed=5) for option in ("fill=last", "fill=mean", "rescale"))
    for t, d in np.ndindex(3, 4):
        if not lost[0, t, d]:
            assert last[0, t, d] == mean[0, t, d] == x[0, t, d] and scaled[0, t, d] == 2 * x[0, t, d]
            continue
        kept = x[0, t, ~lost[0, t]]
        assert mean[0, t, d] == pytest.approx(kept.mean() if len(kept) else 0) and scaled[0, t, d] == 0
        assert last[0, t, d] == (last[0, t - 1, d] if t else 0)


def test_the_last_value_is_kept_over_messages_of_one_boundary_and_one_session():
    receiver = Receiver(noisy("loss:0.6,fill=last", seed=2), 1)
    first, second = np.full((1, 1, 64), 3, np.float32), np.full((1, 1, 64), 5, np.float32)
    receiver.receive(first, boundary=7, fresh=True)
    assert 0 in receiver.receive(second, boundary=8, fresh=False)  # nothing came before at this boundary
    assert {3, 5} <= set(receiver.receive(second, boundary=7, fresh=False).ravel().tolist()) <= {0, 3, 5}
    assert set(receiver.receive(second, boundary=7, fresh=True).ravel().tolist()) == {0, 5}


def test_an_equaliser_leaves_noise_over_gain_and_without_one_the_gain_stays():
    x = np.ones((1, 3000, 64), np.float32)
    assert set(np.unique(received("nakagami:1,1,0.5", x))) == {0, 1}  # digital: what arrives is intact
    faded, equal = (received(f"nakagami:1,1,0.5,snr=40{o}", x) for o in ("", ",equalise"))
    assert faded[faded != 0].min() > 0.4 and faded.max() > 2
    assert np.abs(equal[equal != 0] - 1).max() < 0.2 and ((equal == 0) == (faded == 0)).all()


# --- how it is written


@pytest.mark.parametrize(
    "text",
    ["loss:0.1", "awgn:10", "loss:0.1,snr=12", "nakagami:1,1,0.3", "nakagami:0.5,2,0.4,snr=20,unit=token,equalise",
     "loss:0.2,unit=packet:64,burst=3,fill=mean", "sigma:0.5", "loss:0.1,sigma=2", "loss:0.2,rescale", "loss:0"],
)  # fmt: skip
def test_a_channel_comes_back_from_its_text_and_from_the_wire(text):
    channel = as_channel(text, seed=9)
    assert channel is not None and str(channel) == text
    assert msgspec.msgpack.decode(pack(channel), type=NoisyChannel) == channel


def test_none_is_no_channel():
    assert as_channel("none") is None


REFUSED = {
    "certain loss": "loss:1",
    "a negative loss": "loss:-0.1",
    "loss that is no number": "loss:x",
    "NaN": "loss:nan",
    "no loss at all": "loss",
    "two losses": "loss:0.1,0.2",
    "an unknown kind": "smoke:1",
    "an unknown option": "loss:0.1,colour=red",
    "values for none": "none:1",
    "m below 0.5": "nakagami:0.4,1,0.3",
    "no power": "nakagami:1,0,0.3",
    "a negative threshold": "nakagami:1,1,-0.3",
    "a threshold that no gain passes": "nakagami:1,1,99",
    "too few numbers": "nakagami:1,1",
    "an endless ratio": "awgn:inf",
    "a ratio that no number holds": "awgn:-5000",
    "a sigma that no number holds": "sigma:1e300",
    "an unknown unit": "loss:0.1,unit=word",
    "a packet without a size": "loss:0.1,unit=packet",
    "a packet of nothing": "loss:0.1,unit=packet:0",
    "a packet without an end": "loss:0.1,unit=packet:inf",
    "a packet of half a byte": "loss:0.1,unit=packet:64.5",
    "elements with a size": "loss:0.1,unit=element:4",
    "an unknown fill": "loss:0.1,fill=noise",
    "two noises": "awgn:10,sigma=1",
    "no sigma": "sigma:0",
    "bursts of nothing": "loss:0.1,burst=0",
    "bursts that leave no room": "loss:0.8,burst=2",
    "bursts of gains": "nakagami:1,1,0.3,burst=2",
    "rescaled guesses": "loss:0.1,fill=mean,rescale",
    "an equaliser without gains": "loss:0.1,snr=10,equalise",
}


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_bad_channels_are_refused(text):
    with pytest.raises(InputError) as refused:
        as_channel(text)
    assert refused.value.expected and refused.value.remedy
    with pytest.raises(InputError, match="seed"):
        as_channel("loss:0.1", seed=-1)


def test_the_engine_refuses_before_it_starts_anything():
    with pytest.raises(InputError, match="loss"):
        launch_engine(model="tiny", channel="loss:2", runtime="local")


# --- on the wire


def logits(engine, ids=PROMPT):
    return engine.step(Forward(session=1, ids=torch.tensor([ids]), position=0, keep=len(ids), capacity=len(ids)))


def test_no_channel_is_the_engine_as_it_was_and_a_perfect_one_at_a_cut_has_the_same_bits():
    model = family_model("llama")
    with split(model, devices=3, seed=4) as engine:
        assert engine.route.channel is None
        assert engine.route == compile_route(engine.placement, engine.arch, engine.topology)
        assert list(engine.stream(PROMPT, Sampling(max_new_tokens=8))) == greedy(model, PROMPT, 8)
    seen = []
    for text in ("none", "loss:0"):
        with split(model, devices=2, planner="fixed_cut:1", channel=as_channel(text)) as engine:
            seen.append(logits(engine))
            assert list(engine.stream(PROMPT, Sampling(max_new_tokens=8))) == greedy(model, PROMPT, 8)
            assert report_of(engine).bytes_per_token == engine.route.bytes_per_token(engine.arch)
    assert torch.equal(*seen)


@pytest.mark.parametrize("codec", ["none", "int8"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2", "gpt_neox"])
def test_a_perfect_channel_changes_nothing_and_a_noisy_one_something(family, codec):
    model = family_model(family)
    seen = {}
    for text in ("none", "loss:0", "loss:0.2", "awgn:5"):
        with split(model, devices=3, seed=13, codec=codec, channel=as_channel(text)) as engine:
            seen[text] = logits(engine)
            list(engine.stream(PROMPT, Sampling(max_new_tokens=3)))
            assert report_of(engine).bytes_per_token == engine.route.bytes_per_token(engine.arch)
    scale = seen["none"].abs().max()
    off = {text: float((seen[text] - seen["none"]).abs().max() / scale) for text in seen}
    assert off["loss:0"] < (1e-4 if codec == "none" else 0.05)
    assert off["loss:0.2"] > 0.01 and off["awgn:5"] > 0.01


def test_a_cut_s_state_is_hurt_on_the_way_only_and_as_the_receiver_says():
    model = family_model("llama")
    channel = noisy("loss:0.3", seed=6)
    with split(model, devices=2, planner="fixed_cut:2", channel=channel) as engine:
        got = logits(engine)
        a, b = engine.topology.ids
    receiver = Receiver(channel, crc32(a.encode()), crc32(b.encode()))

    def hurt(_, arguments):
        x_BTD = arguments[0]
        return (torch.from_numpy(receiver.receive(x_BTD.numpy())), *arguments[1:])

    with torch.inference_mode():
        model.model.layers[2].register_forward_pre_hook(hurt)  # the first layer behind p = 2: E12
        expected = model(torch.tensor([PROMPT])).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_receiver_who_lacks_the_residual_gets_it_apart_through_the_channel_too():
    model = family_model("llama")
    where = Topology.uniform(2)
    a, b = where.ids
    both = LayerPlacement(Shares.of({a: [(0, 1)], b: [(1, 3)]}), Shares.whole(40, b))
    placement = Placement((both, both, both), (a, b), Shares.whole(97, b))
    route = compile_route(placement, read_arch(model.config)[0], where, channel=as_channel("loss:0.1"))
    assert {m.content for boundary in route.boundaries for m in boundary.messages} >= {"partial", "state"}
    with split(model, topology=where, placement=placement, channel=as_channel("loss:0.1")) as engine:
        first = logits(engine)
    with split(model, topology=where, placement=placement, channel=as_channel("loss:0.1")) as engine:
        assert torch.equal(first, logits(engine))  # the same seed, the same losses, whatever the threads do
    with split(model, topology=where, placement=placement, channel=as_channel("loss:0.1", seed=1)) as engine:
        assert not torch.equal(first, logits(engine))
