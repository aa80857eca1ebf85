"""Traces and arrivals: formats, units, what is refused, and the statistics of the models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from splitray.errors import InputError
from splitray.sim.network import arrivals, links_varied, varied
from splitray.sim.traces import gilbert_elliott, log_ar1, read_trace
from splitray.sim.workload import bursty, poisson, read_requests
from splitray.topology import Topology


def written(folder: Path, text: str) -> str:
    path = folder / "trace.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_two_columns_are_seconds_and_megabits(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "10.0\t4.0\n12.0\t8.0\n"))
    assert trace.time_s.tolist() == [0.0, 2.0]
    assert trace.value.tolist() == [0.5e6, 1e6]


def test_a_value_holds_until_the_next_one_and_the_last_for_ever(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "0 8\n1.5 0\n2 16\n"))
    assert trace.sampled(4, 1.0).tolist() == [1e6, 0.5e6, 2e6, 2e6]


def test_units_may_be_mixed_in_one_column(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, "0 800kbit/s\n1 0.8 Mbit/s\n2000ms,100kB/s # a note\n\n3 1e5B/s\n"))
    assert trace.value.tolist() == [1e5, 1e5, 1e5, 1e5]


def test_bandwidth_and_ping_may_stand_in_one_row(tmp_path: Path) -> None:
    path = written(tmp_path, "0,12,35\n1,0,40ms\n")
    assert read_trace(f"with_ping:{path}").value.tolist() == [1.5e6, 0.0]
    assert read_trace(f"with_ping:{path}", quantity="rtt").value.tolist() == [0.035, 0.04]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8 Mb/s", 1e6), ("8mb/s", 1e6), ("8Mbps", 1e6), ("8 MBit/s", 1e6), ("8 mbps", 1e6), ("8000kbps", 1e6),
     ("8 Kb/s", 1e3), ("8 bps", 1.0), ("1 MB/s", 1e6), ("1 mB/s", 1e6), ("1 MBps", 1e6), ("1000 KB/s", 1e6),
     ("0.001 GBps", 1e6), ("8 Gbit/s", 1e9), ("7 Bps", 7.0)],
)  # fmt: skip
def test_a_small_b_is_bits_and_a_large_one_bytes(tmp_path: Path, text: str, expected: float) -> None:
    assert read_trace(written(tmp_path, f"0 {text}\n")).value.tolist() == pytest.approx([expected])


def test_packets_count_from_the_first_one_and_cannot_span_an_epoch(tmp_path: Path) -> None:
    epoch = 1_700_000_000_000
    path = written(tmp_path, f"{epoch + 5000}\n{epoch + 5999}\n{epoch + 7000}\n")
    assert read_trace(f"packets:{path}").value.tolist() == [2 * 1504.0, 0.0, 1504.0]
    with pytest.raises(InputError, match=":2: expected at most 10,000,000 ms from the first packet"):
        read_trace("packets:" + written(tmp_path, f"0\n{epoch}\n"))


def test_one_integer_a_packet_counts_bytes_of_each_second(tmp_path: Path) -> None:
    trace = read_trace("packets:" + written(tmp_path, "0\n400\n999\n1000\n3100\n"))
    assert trace.value.tolist() == [3 * 1504.0, 1504.0, 0.0, 1504.0]


def test_a_round_trip_is_in_milliseconds(tmp_path: Path) -> None:
    assert read_trace(written(tmp_path, "0 40\n1 0.05s\n"), quantity="rtt").value.tolist() == [0.04, 0.05]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("0 5 furlong\n", "a unit among"),
        ("0 5parsec/s\n", "a unit among"),
        ("0 5MBIT\n", "a unit among"),
        ("0 10 MBPS\n", "bits"),
        ("0 8\n1 -5kbps\n", ":2: expected a finite value of 0 or more, got -5kbps"),
        ("0 nan\n", ":1: expected a finite value of 0 or more, got nan"),
        ("# first\n0 inf\n", ":2: expected a finite value of 0 or more, got inf"),
        ("inf 5\n", "a finite time"),
        ("0 5\n2 5\n1 5\n", "a time of 2.0 s or later"),
        ("0 5 7 9\n", "two columns"),
        ("zero five\n", "a number"),
        ("# nothing\n", "at least one row"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(tmp_path: Path, text: str, complaint: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError, match=complaint) as caught:
        read_trace(path)
    assert path in caught.value.what


@pytest.mark.parametrize("text", ["5\n3\n", "1.5\n", "7 8\n", "-3\n", "9" * 5000 + "\n"])
def test_packets_out_of_order_or_not_whole_are_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError):
        read_trace(f"packets:{written(tmp_path, text)}")


def test_an_unknown_reader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean packets"):
        read_trace(f"packet:{written(tmp_path, '1')}")
    with pytest.raises(InputError, match="readable text file"):
        read_trace(str(tmp_path / "absent"))


def test_log_ar1_keeps_its_mean_spread_and_memory() -> None:
    values = log_ar1(200_000, 0.1, mean=3.0, sigma_log=0.4, rng=np.random.default_rng(1))
    logs = np.log(values)
    assert values.mean() == pytest.approx(3.0, rel=0.02)
    assert logs.std() == pytest.approx(0.4, rel=0.02)
    assert np.corrcoef(logs[:-1], logs[1:])[0, 1] == pytest.approx(0.95, abs=0.005)


def test_gilbert_elliott_is_down_as_often_and_as_long_as_asked() -> None:
    up = gilbert_elliott(400_000, 0.1, outage_per_s=1 / 30, mean_outage_s=2.0, rng=np.random.default_rng(2))
    assert 1 - up.mean() == pytest.approx(2 / 32, rel=0.05)
    starts = np.flatnonzero(up[:-1] & ~up[1:])
    assert (~up).sum() / len(starts) * 0.1 == pytest.approx(2.0, rel=0.06)


def test_models_vary_around_the_link_and_join_with_plus() -> None:
    rng = np.random.default_rng(3)
    both = varied("log_ar1:0.2+gilbert_elliott", 5e6, 50_000, 1.0, rng, what="bandwidth")
    assert (both == 0).any()
    assert both[both > 0].mean() == pytest.approx(5e6, rel=0.02)
    with pytest.raises(InputError):
        varied("gilbert_elliott", 0.02, 10, 1.0, rng, what="rtt")
    with pytest.raises(InputError):
        varied("log_ar1:-1", 5e6, 10, 1.0, rng, what="bandwidth")


def test_both_ways_of_a_pair_change_together() -> None:
    where = Topology.uniform(2)
    pairs = [(a, b) for a in where.ids for b in where.ids if a != b]
    found = links_varied("log_ar1", where, pairs, 100, 1.0, np.random.default_rng(4), what="bandwidth")
    assert np.allclose(found[pairs[0]], found[pairs[1]])


def test_poisson_and_bursty_arrivals_have_their_rate_and_spread() -> None:
    calm = poisson(0.5, 100_000, prompt_tokens=100, output_tokens=20, rng=np.random.default_rng(5))
    rough = bursty(0.5, 100_000, rng=np.random.default_rng(6))
    for requests, spread in ((calm, 1.0), (rough, 2.0)):
        counts = np.histogram(requests.arrival_s, bins=np.arange(0, 100_001, 10))[0]
        assert len(requests) == pytest.approx(50_000, rel=0.03)
        dispersion = counts.var() / counts.mean()
        assert dispersion == pytest.approx(1.0, abs=0.1) if spread == 1 else dispersion > spread
    assert calm.prompt_tokens.mean() == pytest.approx(100, rel=0.03)
    assert calm.output_tokens.mean() == pytest.approx(20, rel=0.03)
    assert min(calm.prompt_tokens.min(), calm.output_tokens.min()) >= 1


def test_arrivals_are_read_with_both_readers(tmp_path: Path) -> None:
    plain = tmp_path / "plain.csv"
    plain.write_text("arrival_s,prompt_tokens,output_tokens\n0.5,10,3\n2,20,4\n")
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = read_requests(str(plain)), read_requests(f"azure:{azure}")
    assert (first.arrival_s.tolist(), first.output_tokens.tolist()) == ([0.5, 2.0], [3, 4])
    assert second.arrival_s == pytest.approx([0.0, 4.314579])
    assert second.prompt_tokens.tolist() == [374, 396]
    with pytest.raises(InputError) as refused:
        read_requests(str(azure))
    assert refused.value.remedy == f"write azure:{azure}"


@pytest.mark.parametrize(
    "rows", ["", "a,b\n1,2\n", "1,0,3\n", "nan,1,3\n", "5,1,1\n4,1,1\n", "-1,1,1\n", "1,x,1\n", "1,1\n"]
)
def test_arrivals_that_cannot_be_are_refused(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "bad.csv"
    header = "" if rows.startswith("a,") else "arrival_s,prompt_tokens,output_tokens\n"
    path.write_text(header + rows)
    with pytest.raises(InputError):
        read_requests(str(path))
    with pytest.raises(InputError):
        arrivals("poisson:0", 10.0, 1.0, np.random.default_rng(0))
