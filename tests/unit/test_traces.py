"""Traces and arrivals: formats, units, what is refused, and the statistics of the models."""

from __future__ import annotations

import gzip
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from splitray.errors import InputError
from splitray.sim.network import arrivals, links_varied, varied
from splitray.sim.traces import gilbert_elliott, log_ar1, read_trace
from splitray.sim.workload import Requests, bursty, dealt, poisson, read_requests
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
    with pytest.raises(InputError, match="readable file.*correct the path"):
        read_trace(str(tmp_path / "absent"))
    (tmp_path / "old.xls").write_bytes(bytes.fromhex("d0cf11e0a1b11ae1"))
    with pytest.raises(InputError, match="Excel workbook of the old kind"):
        read_trace(str(tmp_path / "old.xls"))


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


H = "arrival_s,prompt_tokens,output_tokens\n"


def raw(folder: Path, content: str | bytes) -> str:
    path = folder / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.mark.parametrize(
    ("content", "values"),
    [("0;5,5\n1;6\n", [5.5, 6]), ("0\t5,5\n1\t6,25\n", [5.5, 6.25]), ("0 5,5\n1 6,25 Mbit/s\n", [5.5, 6.25]),
     ("0, 5\n1 ,6\n", [5, 6]), ('"0","5"\n"1","6"\n', [5, 6]), ("0,5,\n1,6,\n,,\n", [5, 6]), ("0 5\r1 6\r", [5, 6]),
     ("0 5\r\n1 6\r\n", [5, 6]), ("\ufeff0 5\n1 6\n", [5, 6]), ("; a\n// b\n# c\n0 5 # d\n1 6\n", [5, 6]),
     (gzip.compress(b"0 5\n1 6\n", mtime=0), [5, 6]), ("0;1,234\n1;6\n", [1.234, 6]),
     ("1700000000000ms 5\n1700000001000ms 6\n", [5, 6])],
)  # fmt: skip
def test_columns_are_told_apart_and_a_value_is_one(tmp_path: Path, content: str | bytes, values: list[float]) -> None:
    trace = read_trace(raw(tmp_path, content))
    assert trace.time_s.tolist() == [0.0, 1.0]
    assert trace.value.tolist() == pytest.approx([125e3 * v for v in values])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("0\t1,234\n", ":1: expected a number with a decimal point, got '1,234'"), ("0;1.234,5\n", "decimal point"),
     ("0\t1,234,567\n", "decimal point"), ('0,"5,5"\n', "decimal point"), ("0,,5\n", "two columns"),
     ("0;5\n;6\n", ":2: expected a number"), ("time;rate\n0;5\n", "write # before"), ("0 1_000\n", "a number"),
     ("0 ٣\n", "a number"), ("1700000000000 5\n", "1700000000000ms"), ("0 5\n1e8 5\n", "from the first row"),
     ("0 1e308\n", "finite value"), ("0 5\n" + "1" * 70_000, ":2: .*characters"), ("0 5\n1 6\0\n", ":2: .*NUL"),
     (b"0 5\n1 6 # \xe9\n", ":2: expected a text in UTF-8, got the byte 0xe9"), ("0 5\n".encode("utf-16"), "UTF-16"),
     (b"BZh91AY&SY", "bzip2"), (b"\x28\xb5\x2f\xfd\0", "zstd"), (b"PK\x03\x04", "Excel"),
     (gzip.compress(b"0 5\n1 6\n", mtime=0)[:-9], "readable file"), ("", "at least one row")],
)  # fmt: skip
def test_what_may_mean_something_else_is_refused(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_trace(raw(tmp_path, content))


def test_decimal_commas_are_no_third_column(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="three columns"):
        read_trace("with_ping:" + raw(tmp_path, "0\t5,5\n1\t6,5\n"))
    assert read_trace("with_ping:" + raw(tmp_path, "0;8,8;35,5\n"), quantity="rtt").value == pytest.approx([0.0355])


@pytest.mark.parametrize("rows", ["7 5\n", "0 4\n0 5\n", "0 4\n1e-300 5\n"])
def test_the_last_of_equal_times_counts(tmp_path: Path, rows: str) -> None:
    trace = read_trace(raw(tmp_path, rows))
    assert trace.repeated(10.0).sampled(5, 1.0).tolist() == [625e3] * 5


def test_a_trace_too_short_for_a_long_time_is_not_repeated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most 10,000,000 values"):
        read_trace(raw(tmp_path, "0 4\n1e-5 5\n")).repeated(1e6)


@pytest.mark.parametrize("path", ["/dev/zero", "/", "a\0b", "a" * 5000])
def test_what_may_never_end_is_not_read(path: str) -> None:
    for read in (read_trace, read_requests):
        with pytest.raises(InputError, match="a plain file|a readable file"):
            read(path)


@pytest.mark.parametrize(
    "content",
    [H.replace(",", ";") + "0,5;5;6\n", f"# today\n\n; x\n{H}# more\n0.5,5,6\n", f"\ufeff{H}0.5,5,6\n",
     " Arrival_S ,PROMPT_TOKENS, output_tokens\n 0.5, 5,6\n",
     "output_tokens,who,arrival_s,prompt_tokens\n6,a;b,0.5,5\n",
     '"arrival_s","prompt_tokens","output_tokens"\n"0.5","5","6"\n', (H + "0.5,5,6\n").replace("\n", "\r"),
     (H + "0.5,5,6\n").replace("\n", "\r\n"), (H + "0,5\t5\t6\n").replace(",", "\t", 2), H + "0.5,5,6,\n,,\n",
     gzip.compress((H + "0.5,5,6\n").encode(), mtime=0)],
)  # fmt: skip
def test_arrivals_are_read_as_spreadsheets_and_people_write_them(tmp_path: Path, content: str | bytes) -> None:
    found = read_requests(raw(tmp_path, content))
    assert (found.arrival_s.tolist(), found.prompt_tokens.tolist(), found.output_tokens.tolist()) == ([0.5], [5], [6])
    assert found.prompt_tokens.dtype == np.int64


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(f"{H}0,{10**30},6\n", ":2: expected prompt_tokens, a whole number"), (H + "0,5,5,6\n", ":2: expected 3 columns"),
     (H + "0,5\n", "3 columns"), (H + "0,5.0,6\n", "whole"), (H + "0,1_0,6\n", "whole"), (H + "0,-5,6\n", "whole"),
     (H.replace(",", ";") + "0;1,234;6\n", "whole"), (H + "1700000000,5,6\n", "seconds from the start"),
     (H + "inf,5,6\n", "seconds"), (H + '"0,5,6\n', "3 columns"), (H, "rows with arrival_s"), ("", "a header"),
     ("arrival_s," + H + "0,0,5,6\n", "rows with the columns"), (H + "0,5,6\n0,5,6\0\n", "NUL")],
)  # fmt: skip
def test_arrivals_that_say_something_else_are_refused(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_requests(raw(tmp_path, content))


BURST = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
MOON = '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}\n'


def test_mooncake_and_burstgpt_files_are_read_by_their_names(tmp_path: Path) -> None:
    rows = "5,ChatGPT,472,18,490,Conversation log\n45.5,GPT-4,1087,0,1087,API log\n118,GPT-4,417,276,693,API log\n"
    burst = read_requests("burstgpt:" + raw(tmp_path, BURST + rows))
    assert (burst.arrival_s.tolist(), burst.output_tokens.tolist()) == ([0.0, 113.0], [18, 276])
    moon = read_requests("mooncake:" + raw(tmp_path, MOON + MOON.replace("27482", "30532")))
    assert moon.arrival_s.tolist() == pytest.approx([0.0, 3.05]) and moon.prompt_tokens.tolist() == [6955] * 2
    for content, name in ((BURST + rows, "burstgpt"), (MOON, "mooncake")):
        path = raw(tmp_path, content)
        with pytest.raises(InputError, match=f"write {name}:{path}"):
            read_requests(path)
    with pytest.raises(InputError, match="did you mean burstgpt"):
        read_requests(f"burst:{path}")


@pytest.mark.parametrize(
    "row",
    ["[1]", "{}", MOON.replace("27482", "NaN"), MOON.replace("27482", "true"), MOON.replace("52", "5.2"), "[" * 9_000,
     MOON.replace("6955", "9" * 5000), MOON.replace("{", '{"timestamp": 1, '), MOON.replace("6955", '"6955"')],
)  # fmt: skip
def test_a_line_that_is_no_request_is_refused_with_its_number(tmp_path: Path, row: str) -> None:
    with pytest.raises(InputError, match=":2: expected"):
        read_requests("mooncake:" + raw(tmp_path, MOON + row))


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kathmandu"])
def test_times_without_a_zone_are_utc_wherever_one_is(tmp_path: Path, zone: str, monkeypatch: Any) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:  # the clocks of New York went forward between the first two
        rows = ["2024-03-10 06:59:59", "2024-03-10 07:00:01+00:00", "2024-03-10T09:00:02.1234567+02:00"]
        text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{r},5,6\n" for r in rows)
        assert read_requests("azure:" + raw(tmp_path, text)).arrival_s == pytest.approx([0.0, 2.0, 3.123457])
    finally:
        monkeypatch.undo()
        time.tzset()


def test_a_long_table_takes_memory_for_its_numbers_only(tmp_path: Path) -> None:
    path = raw(tmp_path, H + "".join(f"{i / 10},{i % 999 + 1},{i % 99 + 1}\n" for i in range(10_000)))
    tracemalloc.start()
    assert len(read_requests(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000 * 3 * 8 * 4


def test_recorded_requests_without_a_rate_are_not_dealt() -> None:
    once = Requests(np.zeros(3), np.ones(3, np.int64), np.ones(3, np.int64))
    with pytest.raises(InputError, match="different times"):
        dealt(once, 2, 1.0, 10.0, np.random.default_rng(0))


def test_a_home_is_known_behind_the_name_of_a_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("0 5\n1 6\n")
    assert read_trace("columns:~/t.txt").value.tolist() == [625000.0, 750000.0]
