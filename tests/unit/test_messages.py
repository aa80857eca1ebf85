"""Orders and answers: each comes back from its bytes as it was, and whatever is none is refused by name and field."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from families import family_model

from splitray.arch import Range
from splitray.channel import as_channel
from splitray.errors import DeviceLost, InputError, ModelError
from splitray.model.kv_cache import KvPiece
from splitray.model.reading import read_arch
from splitray.planners import make_planner
from splitray.planners.protocol import ClusterState
from splitray.runtime.checkpoint import Saved
from splitray.runtime.device.shard_host import ShardHost
from splitray.runtime.device.side import Side
from splitray.runtime.engine.epoch import Epoch
from splitray.runtime.fleet import ThreadFleet
from splitray.runtime.sampling import Sampling
from splitray.runtime.wire import Endpoint, Kind, header
from splitray.runtime.wire import answers as said
from splitray.runtime.wire import messages as wanted
from splitray.runtime.wire.answers import ANSWERS, Refused, answer_of
from splitray.runtime.wire.calls import ask
from splitray.runtime.wire.listener import dial
from splitray.runtime.wire.messages import (
    ORDERS,
    BounceOrder,
    DecodeOrder,
    HelloOrder,
    PaceOrder,
    PingOrder,
    StatsOrder,
)
from splitray.runtime.wire.packing import pack, to_plain
from splitray.topology import Topology

HERE = Endpoint("name", "127.0.0.1", 7000)
PIECES = (KvPiece(0, Range(0, 2)), KvPiece(3, Range(1, 4)))
SAVED = Saved("/a/b", "f00", 12, 0, 4, ((0, 0, 2), (1, 1, 3)))
SUCCEEDING = wanted.Succeeding(
    id=3, capacity=90, start=0, stop=7, lost=PIECES, files=(SAVED,), store="/store",
    sources=(wanted.KvSource(device="b", endpoint=HERE, epoch=1, pieces=PIECES),),
)  # fmt: skip
LENDERS = (wanted.Lender(device="b", endpoint=HERE, model_path="/models/m"),)


def _assignment(channel: str | None = None) -> wanted.Assignment:
    """What the second of three devices gets of a small model, as the engine says it."""
    arch, layout = read_arch(family_model("llama").config)
    topology = Topology.uniform(3)
    placement = make_planner("random", seed=3).propose(ClusterState(arch=arch, topology=topology))
    epoch = Epoch.of(4, placement, topology, arch=arch, layout=layout, model_path="/m", codec="int8", lean=True,
                     channel=None if channel is None else as_channel(channel))  # fmt: skip
    return epoch.assignment(topology.ids[1])


def _orders() -> list[wanted.Order]:
    assignment = _assignment()
    return [
        wanted.HelloOrder(),
        wanted.SwitchOrder(epoch=4, dial={"b": HERE}, expect=("c",), spin_s=0.5, sessions=(SUCCEEDING,)),
        DecodeOrder(session=1, attempt=2, epoch=3, prompt=[[1, 2], [3, 4]], attention_mask=[[0, 1], [1, 1]],
                    sampling=Sampling(max_new_tokens=9, temperature=0.5, stop_ids=(1, 2)), capacity=40),
        wanted.StepOrder(session=1, attempt=2, epoch=3, batch=1, new_tokens=1, position=5, keep=1, capacity=9,
                         ids=bytes(8), attention_mask=None, position_ids=bytes(8), reorder=[0]),
        wanted.EndOrder(session=1),
        StatsOrder(),
        wanted.EchoOrder(peer="b", attempt=1, size=8, rounds=2, first=True, cold_bytes=0),
        wanted.SpeedsOrder(cold_bytes=1),
        wanted.LeaveOrder(),
        PingOrder(),
        PaceOrder(bytes_per_s=1.5),
        wanted.BusyOrder(),
        wanted.ReachOrder(peers={"b": HERE}, within_s=1.0),
        wanted.ProbeOrder(peer="b", endpoint=HERE, num_bytes=3, within_s=1.0),
        BounceOrder(num_bytes=1, filling=b"xyz"),
        wanted.AbortOrder(epoch=1),
        wanted.StageOrder(assignment=assignment, lenders=LENDERS, sessions=(SUCCEEDING,)),
        wanted.ReadyOrder(assignment=_assignment("nakagami:1,1,0.3,unit=token"), lenders=()),
        wanted.KvOrder(session=1, epoch=2, pieces=PIECES, start=0, stop=9),
        wanted.CheckpointOrder(session=1, epoch=2, start=0, stop=9, store="memory://x"),
        wanted.ConfigOrder(path="/m"),
        wanted.KeyOrder(path="/m", name="lm_head.weight"),
        wanted.SliceOrder(path="/m", name="x", axis=1, ranges=(Range(0, 2),)),
        wanted.NumbersOrder(path="/m", name="x", outputs=None, block=Range(0, 2)),
        wanted.ExpertsOrder(path="/m", name="x", experts=(0, 3)),
        wanted.FingerprintOrder(path="/m"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def orders() -> dict[str, wanted.Order]:
    return {name: order for order in _orders() for name, kind in ORDERS.types.items() if type(order) is kind}


@pytest.mark.parametrize("name", ORDERS.types)
def test_every_order_comes_back_from_its_bytes(orders, name):
    raw = pack(orders[name])
    assert ORDERS.unpack(raw) == ORDERS.unpack(bytearray(raw)) == orders[name]
    assert msgspec.msgpack.decode(raw)["order"] == name


@pytest.mark.parametrize("name", ORDERS.types)
def test_an_order_with_a_field_too_few_too_many_or_of_another_type_is_refused_by_name_and_field(orders, name):
    plain = msgspec.msgpack.decode(pack(orders[name]))
    must = {f.name for f in msgspec.structs.fields(ORDERS.types[name]) if f.required}
    wrong = [({**plain, "colour": 1}, "colour")]
    wrong += [({k: v for k, v in plain.items() if k != field}, field) for field in must]
    wrong += [({**plain, field: [{"colour": 1}]}, field) for field in plain if field != "order"]
    for bad, field in wrong:
        with pytest.raises(InputError, match=rf"(?s)order '{name}'.*{field}.*same version"):
            ORDERS.unpack(pack(bad))


MALFORMED = {
    "no bytes": b"",
    "no msgpack": b"\xc1",
    "no map": pack([1, 2]),
    "no name": pack({"epoch": 1}),
    "a name that is none": pack({"order": 7}),
    "bytes behind it": pack(PingOrder()) + b"x",
    "text that is no UTF-8": b"\x81\xa5order\xa4\xff\xfe\xff\xfe",
    "a thousand lists in each other": b"\x81\xa5order" + b"\x91" * 100_000,
}


@pytest.mark.parametrize("raw", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_order_is_refused(raw):
    with pytest.raises(InputError, match="order"):
        ORDERS.unpack(raw)


def test_an_unknown_order_is_refused_with_the_name_that_comes_close():
    with pytest.raises(InputError, match=r"name of the order: expected one of .*'ping'.*got 'pingg'.*mean ping\?"):
        ORDERS.unpack(pack({"order": "pingg"}))


def test_a_part_of_an_order_refuses_what_it_does_not_know_too(orders):
    plain = msgspec.msgpack.decode(pack(orders["stage"]))
    plain["sessions"][0]["colour"] = 1
    with pytest.raises(InputError, match=r"order 'stage'.*colour.*sessions"):
        ORDERS.unpack(pack(plain))


def test_numbers_out_of_numpy_are_numbers():
    raw = pack(PaceOrder(bytes_per_s=np.float64(2.5)))
    assert ORDERS.unpack(raw) == PaceOrder(bytes_per_s=2.5)
    with pytest.raises(TypeError, match="Tensor|object has no place"):
        pack(PaceOrder(bytes_per_s=object()))  # type: ignore[arg-type]


def test_devices_take_every_order_there_is_and_none_twice():
    assert set(ShardHost.TAKES) | set(Side.TAKES) == set(ORDERS.types.values())
    assert not set(ShardHost.TAKES) & set(Side.TAKES)


# --- answers


def test_every_answer_comes_back_from_its_bytes():
    values = {int: 3, float: 0.5, str: "x", bool: True, "Saved | None": SAVED, "dict[int, int]": {1: 2},
              Refused: Refused(type="InputError", what="a", expected="b", actual="c", remedy="d")}  # fmt: skip
    for kind in ANSWERS.types.values():
        fields = {f.name: _example(f.type, values) for f in msgspec.structs.fields(kind)}
        assert ANSWERS.unpack(pack(kind(**fields))) == kind(**fields)


def _example(kind, values):
    if kind in values:
        return values[kind]
    return msgspec.convert(next(v for v in (SAVED, {1: 2}, ["x"], [0.5], 3, "x") if _fits(v, kind)), kind)


def _fits(value, kind) -> bool:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError:
        return False
    return True


@pytest.mark.parametrize(
    "error",
    [ModelError("m", expected="a", actual="b", remedy="c"), InputError("x", expected=1, actual=2, remedy="y"),
     DeviceLost("gone"), KeyError("k")],
)  # fmt: skip
def test_an_error_crosses_with_its_type_and_says_which_device(error):
    expected = type(error) if isinstance(error, InputError | DeviceLost) else RuntimeError
    with pytest.raises(expected, match="^b") as raised:
        answer_of(pack(Refused.of(error)), "b")
    assert type(raised.value) is expected and "gone" in str(raised.value) or not isinstance(error, DeviceLost)


# --- a device


def test_a_malformed_order_is_answered_and_the_device_serves_on():
    fleet = ThreadFleet(deadline_s=20)
    try:
        (device,) = Topology.uniform(1).devices
        endpoint = fleet.start([device])[device.id]
        for role, next_order in (("caller/x", HelloOrder()), ("side/engine", PingOrder())):
            channel = dial(endpoint, me=role, peer=device.id, token=fleet.token, deadline_s=20)
            for raw in [*MALFORMED.values(), pack({"order": "nonsense"}), pack({"order": "switch", "epoch": "x"})]:
                channel.send(header(Kind.CALL), raw)
                frame = channel.read()
                assert frame is not None
                with pytest.raises(InputError, match="order"):
                    answer_of(frame.payload, device.id)
            assert isinstance(ask(channel, next_order), said.Done | said.Alive)
            other = PingOrder() if role == "caller/x" else HelloOrder()
            with pytest.raises(InputError, match="other connection"):
                ask(channel, other)
            channel.close()
    finally:
        fleet.close()


def test_what_a_user_sees_of_an_answer_is_a_plain_dict():
    assert to_plain(said.Alive(epoch=3)) == {"epoch": 3}
