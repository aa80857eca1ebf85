"""Any bytes give a value or an `InputError`, whoever reads them: random ones, valid files that are mutated, and valid
documents with random values in them. 100 examples of each reader in `make test`, 2,000 more in `make test-all`.
"""

from __future__ import annotations

import contextlib
import copy
import gzip
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from test_topology import TWO, document
from test_traces import BURST, MOON, H

from splitray.catalog import architecture
from splitray.errors import InputError
from splitray.model.folder import INDEX, ONE_FILE, check_folder, weight_files
from splitray.model.reading import read_config
from splitray.model.source import Checkpoint
from splitray.placement import Placement, validate
from splitray.profile import CoreSpeed, LinkSpeed, Profile
from splitray.profiling.perplexity import read_text
from splitray.prompts.prompts_file import entries, num_prompts
from splitray.quality.accuracy import AccuracyTable
from splitray.quality.surrogate import Surrogate
from splitray.quality.table import QualityTable
from splitray.rl.policy_planner import SHIPPED as POLICY
from splitray.rl.split_point.network import SplitNetwork
from splitray.rl.world.policy import Policy
from splitray.runtime.checkpoint import Store
from splitray.runtime.generation import _prompt_ids
from splitray.runtime.launch import SHIPPED
from splitray.runtime.sampling import Sampling
from splitray.sim.traces import read_trace
from splitray.sim.workload import read_requests
from splitray.topology import Topology
from splitray.user_file import UserFile

PACKAGE = SHIPPED.parents[1]
ROOT = PACKAGE.parent
ARCH = replace(architecture("gpt2-xl"), num_layers=1)
WHOLE = {
    "layers": [{"attention": {"edge0": [[0, 25]]}, "ffn": {"edge0": [[0, 100]], "cloud0": [[100, 6400]]}}],
    "embedding": ["edge0"],
    "head": {"cloud0": [[0, 50257]]},
}
TENSORS = {"weight_0": np.ones((2, 3), np.float32), "bias_0": np.ones(3, np.float32)}


@dataclass(frozen=True)
class Reader:
    """One way into the package: `read` takes the path that the bytes lie at; `valid` is what it accepts."""

    read: Callable[[Path], object]
    valid: bytes
    name: str = "file"
    beside: Callable[[Path], object] = lambda folder: None
    """Writes what lies beside the file."""


def topology(path: Path) -> None:
    found = Topology.load(path)
    assert all(0 < d.memory_bytes < 1e25 and d.id.isprintable() for d in found.devices)
    found.require_connected()


def placement(path: Path) -> None:
    validate(Placement.load(path), ARCH, Topology.uniform(2))


def trace(reader: str, quantity: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        found = read_trace(f"{reader}:{path}", quantity=quantity)
        assert np.isfinite(found.value).all() and (np.diff(found.time_s) > 0).all() and found.time_s[0] == 0
        assert np.isfinite(found.repeated(60.0).sampled(10, 1.0)).all()

    return read


def arrivals(reader: str) -> Callable[[Path], None]:
    def read(path: Path) -> None:
        found = read_requests(f"{reader}{path}")
        assert (np.diff(found.arrival_s) >= 0).all() and found.arrival_s[0] >= 0 and len(found)
        assert found.prompt_tokens.dtype == found.output_tokens.dtype == np.int64
        assert found.prompt_tokens.min() > 0 and found.output_tokens.min() > 0

    return read


def card(load_it: Callable[[Path], object], tensors: bytes) -> Callable[[Path], None]:
    """A card that belongs to the tensors beside it, whatever else it says."""

    def read(path: Path) -> None:
        path.with_suffix(".safetensors").write_bytes(tensors)
        raw = path.read_bytes()
        try:
            document = json.loads(raw)
            path.write_text(json.dumps({**document, "sha256": hashlib.sha256(tensors).hexdigest()}))
        except (ValueError, TypeError, RecursionError):
            path.write_bytes(raw)
        load_it(path.with_suffix(""))

    return read


def tensors(path: Path) -> None:
    """Tensors that belong to the card beside them, whatever they are."""
    layers = {"format": 1, "layers": 1, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(layers))
    SplitNetwork.load(path.with_suffix(""))


def prompts(path: Path) -> None:
    """Each line is a prompt that a request can be made of, or says why it is none."""
    file = UserFile(path, "prompts", "correct the line")
    found = list(entries(file))
    assert [e.index for e in found] == list(range(num_prompts(file)))
    for entry in found:
        json.dumps({"id": entry.id}, allow_nan=False)
        if isinstance(entry.prompt, InputError):
            assert len(str(entry.prompt)) < 10_000
            continue
        with contextlib.suppress(InputError):
            replace(Sampling(max_new_tokens=1), **entry.prompt.own_sampling)


def checkpoint(path: Path) -> None:
    found = Checkpoint(path.parent)
    for key in found.shapes:
        found.type_of(key), found.read(key)
    found.fingerprint()


def config(path: Path) -> None:
    check_folder(path.parent)
    read_config(path.parent)


def a_profile() -> bytes:
    core = CoreSpeed(gemv_bytes_per_s=1e10, gemm_flops_per_s=5e10, copy_bytes_per_s=1e10)
    link = LinkSpeed(ping_s=1e-4, mebibyte_s=1e-3)
    profile = Profile(
        measured_at="2026-11-24T12:00:00+00:00", machine={"cores": 2}, memory_bytes=8e9, read_bytes_per_s=20e9,
        shared_bytes_per_s=15e9, launch_s=6e-5, hop_s=9e-5, hop_bytes=3072, cores=[core] * 2, links={(0, 1): link},
    )  # fmt: skip
    return yaml.safe_dump(profile.document()).encode()


QUALITY = json.loads((PACKAGE / "quality" / "shipped" / "tiny-neox.json").read_bytes())
SURROGATE = PACKAGE / "quality" / "shipped" / "surrogate"
MANIFEST = {"session": 1, "start": 0, "ids": [[1, 2]], "files": [
    {"path": "a", "sha256": "b", "num_bytes": 1, "start": 0, "stop": 2, "pieces": [[0, 0, 1]]}]}  # fmt: skip
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2024-05-10 00:00:00+00:00,5,6\n"
PROMPT = json.dumps({
    "id": "a", "prompt": "the cat", "max_tokens": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "seed": 1,
    "stop": ["."],
}).encode()  # fmt: skip
READERS = {
    "topology": Reader(topology, TWO.encode()),
    "topology in JSON": Reader(topology, json.dumps(document()).encode()),
    "profile": Reader(topology, a_profile()),
    "placement": Reader(placement, yaml.safe_dump(WHOLE).encode()),
    "bandwidth": Reader(trace("columns", "bandwidth"), b"# a\n0 5\n1;5,5\n2,6 Mbit/s\n"),
    "round trips": Reader(trace("columns", "rtt"), b"0 40\n1 0.05s\n2\t35,5\n"),
    "with_ping": Reader(trace("with_ping", "rtt"), b"0,12,35\n1;0;40,5ms\n"),
    "packets": Reader(trace("packets", "bandwidth"), b"0\n400\n999\n1000\n3100\n"),
    "arrivals": Reader(arrivals(""), (H + "0.5,5,6\n1,7,8\n").encode()),
    "azure": Reader(arrivals("azure:"), AZURE.encode()),
    "burstgpt": Reader(arrivals("burstgpt:"), (BURST + "5,GPT-4,472,18,490,API log\n6,GPT-4,9,0,9,x\n").encode()),
    "mooncake": Reader(arrivals("mooncake:"), (MOON * 2).encode()),
    "packed": Reader(trace("columns", "bandwidth"), gzip.compress(b"".join(b"%d 5\n" % i for i in range(50)), mtime=0)),
    "text": Reader(read_text, "the cat\nsat é\n".encode()),
    "prompt ids": Reader(lambda p: _prompt_ids(None, None, p.read_text("latin-1")), b"1, 2,3"),
    "prompts": Reader(prompts, PROMPT),
    "prompts, a line each": Reader(prompts, PROMPT + b'\n\n"b"\n{"prompt_ids": [1, 2]}\r\n'),
    "quality table": Reader(QualityTable.load, json.dumps({**QUALITY, "rows": QUALITY["rows"][:3]}).encode()),
    "accuracy table": Reader(AccuracyTable.load, (SHIPPED / "accuracy.json").read_bytes()),
    "surrogate's card": Reader(
        card(Surrogate.load, SURROGATE.with_suffix(".safetensors").read_bytes()),
        SURROGATE.with_suffix(".json").read_bytes(),
        "s.json",
    ),  # fmt: skip
    "policy's card": Reader(
        card(Policy.load, POLICY.with_suffix(".safetensors").read_bytes()),
        POLICY.with_suffix(".json").read_bytes(),
        "p.json",
    ),  # fmt: skip
    "cut policy's card": Reader(card(SplitNetwork.load, save(TENSORS)), b'{"format": 1, "layers": 1}', "p.json"),
    "cut policy's tensors": Reader(tensors, save(TENSORS), "p.safetensors"),
    "model's config": Reader(config, (SHIPPED / "config.json").read_bytes(), "config.json"),
    "index of weights": Reader(
        lambda p: weight_files(p.parent),
        json.dumps({"weight_map": {"a": "a.safetensors"}}).encode(),
        INDEX,
        lambda folder: (folder / "a.safetensors").write_bytes(save(TENSORS)),
    ),  # fmt: skip
    "weights": Reader(
        checkpoint,
        save({**TENSORS, "n": np.array(1.0)}),
        ONE_FILE,
        lambda folder: (folder / "config.json").write_text("{}"),
    ),  # fmt: skip
    "checkpoint's manifest": Reader(
        lambda p: Store(str(p.parent)).manifest(), json.dumps(MANIFEST).encode(), "manifest-000000000.json"
    ),
}

ODD = [
    *b".inf -.inf nan NaN Infinity 1e308 1e-320 -1 -0 010 1_000 1:30 0x10 1e9 1e300 true null ~ yes 2024-01-01".split(),
    *b'[ ] { } [] {} " "" \' *a !!python/object:a , ; : # // ../ / \\u0000 \\ud800'.split(),
    *(b"&a ", b"<<: ", b"? ", b"!!float ", b"---\n", b"...\n", b"%YAML 1.1\n", b"\t", b"\0", b"\r", b"\n", b" "),
    *(b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\x1f\x8b", "\u0663".encode(), "\u2028".encode(), "🎉".encode()),
    *(b"9" * 400, b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b"- " * 5000),
]
STEPS = ("flip", "cut", "put", "put", "line", "token", "token", "end")
STEP = st.tuples(st.sampled_from(STEPS), st.integers(0, 2**16), st.integers(0, 2**16), st.sampled_from(ODD))


def mutated(valid: bytes, steps: list[tuple[str, int, int, bytes]]) -> bytes:
    for kind, a, b, odd in steps:
        at = a % (len(valid) + 1)
        if kind == "flip" and valid:
            at %= len(valid)
            valid = valid[:at] + bytes([valid[at] ^ (1 << b % 8)]) + valid[at + 1 :]
        elif kind == "cut":
            valid = valid[:at] + valid[at + b % 40 :]
        elif kind == "put":
            valid = valid[:at] + odd + valid[at:]
        elif kind == "line":
            lines = valid.splitlines(keepends=True) or [b""]
            lines.insert(a % (len(lines) + 1), lines[b % len(lines)])
            valid = b"".join(lines)
        elif kind == "token":
            words = [m for m in re.finditer(rb"[\w.+-]+", valid)]
            if words:
                word = words[a % len(words)]
                valid = valid[: word.start()] + odd + valid[word.end() :]
        elif kind == "end":
            valid = valid[:at]
    return valid


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**30, -1, 0, 2**63]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def replaced(document: Any, choices: list[int], value: Any) -> Any:
    """The document with a value somewhere in it: each choice goes a step deeper."""
    document = copy.deepcopy(document)
    at = document
    for i, choice in enumerate(choices):
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[choice % len(keys)]
        inner = at[key]
        if i + 1 == len(choices) or not isinstance(inner, dict | list) or not inner:
            at[key] = value
            break
        at = inner
    return document


def contents(valid: bytes) -> st.SearchStrategy[bytes]:
    changed = st.lists(STEP, min_size=1, max_size=5).map(lambda steps: mutated(valid, steps))
    kinds = [st.binary(max_size=200), changed, changed, changed]
    try:
        document = yaml.load(valid.decode(), yaml.CSafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):
        document = None
    if isinstance(document, dict) and document:
        choices = st.lists(st.integers(0, 50), min_size=1, max_size=5)
        structured = st.builds(lambda c, v: json.dumps(replaced(document, c, v)).encode(), choices, VALUES)
        kinds += [structured, structured]
    return st.one_of(kinds)


@pytest.mark.parametrize("examples", [100, pytest.param(2000, marks=pytest.mark.full)])
@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_any_bytes_give_a_value_or_an_input_error(reader: Reader, examples: int, tmp_path: Path) -> None:
    path = tmp_path / reader.name
    reader.beside(tmp_path)
    path.write_bytes(reader.valid)
    reader.read(path)  # what it imports does not count

    @settings(max_examples=examples, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(contents(reader.valid))
    def holds(content: bytes) -> None:
        path.write_bytes(content)
        began_s = time.process_time()
        try:
            reader.read(path)
        except InputError as error:
            assert len(str(error)) < 10_000
        assert time.process_time() - began_s < 1, "of this processor: a hang, and no slow machine"

    holds()


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS)
def test_what_the_fuzzing_begins_with_is_valid(reader: Reader, tmp_path: Path) -> None:
    path = tmp_path / reader.name
    reader.beside(tmp_path)
    path.write_bytes(reader.valid)
    reader.read(path)


GREAT: dict[
    str, tuple[Any, bytes]
] = {  # too great, too many or too deep, each of its own kind; the last characters are wide
    "bytes": (Topology, b"x" * 50_000_000),
    "values": (Topology, b"- 1\n" * 400_000),
    "flow": (Topology, b"[" + b"{a: 1}," * 400_000 + b"]"),
    "depth": (Topology, b"[" * 1_000_000),
    "a wide scalar": (Topology, b"x: " + "🎉".encode() * 4_900_000),
    "quotes": (Placement, b'"' + b"a " * 5_000_000),
    "zeros in gzip": (Topology, gzip.compress(b"\0" * 100_000_000, mtime=0)),
    "rows": (QualityTable, b'{"rows": [' + b"[]," * 2_000_000 + b"0]}"),
    "objects": (AccuracyTable, b"[" + b'{"a":0},' * 120_000 + b"0]"),
    "a row": (read_trace, b"0 5\n1 " + b"6" * 30_000_000),
    "a header": (read_requests, b"a," * 10_000_000),
    "digits": (read_trace, b"0 " + b"9" * 65_000 + b"x\n"),
    "digits of a time": (read_requests, b"arrival_s,prompt_tokens,output_tokens\n" + b"9" * 65_000 + b"x,5,6\n"),
    "digits in YAML": (Topology, b"devices:\n  - {id: a, tier: edge, memory_bytes: " + b"9" * 5_000_000 + b"x}\n"),
    "a key": (Topology, b"? " + b"k" * 5_000_000 + b"\n: 1\n"),
    "a row in gzip": (read_trace, gzip.compress(b"0" * 100_000_000, mtime=0)),
}
READ_ALL = r"""
import json, re, sys, time
from pathlib import Path
from splitray.errors import InputError
from splitray.placement import Placement
from splitray.quality.accuracy import AccuracyTable
from splitray.quality.table import QualityTable
from splitray.sim.traces import read_trace
from splitray.sim.workload import read_requests
from splitray.topology import Topology

def peak():
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])

found, before = {}, peak()
for line in sys.stdin:
    name, reader, path = json.loads(line)
    read = globals()[reader]
    start = time.process_time()
    try:
        getattr(read, "load", read)(path)
    except InputError as error:
        found[name] = [str(error), time.process_time() - start, peak() - before]
print(json.dumps(found))
"""


def test_great_files_are_refused_with_little_memory(tmp_path: Path) -> None:
    orders = []
    for name, (reader, content) in GREAT.items():
        (tmp_path / name).write_bytes(content)
        orders.append(json.dumps([name, reader.__name__, str(tmp_path / name)]))
    command, told = [sys.executable, "-c", READ_ALL], "\n".join(orders)
    done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == GREAT.keys()
    assert {name: peak for name, (_, _, peak) in found.items() if peak > 200e6} == {}
    assert {name: seconds for name, (_, seconds, _) in found.items() if seconds > 3} == {}, "a hang, not a slow machine"
