"""The command line: what it prints, what it refuses and how, and that nothing is left running."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from splitray.commands.cli import app
from splitray.errors import InputError
from splitray.local_ray import free_port
from splitray.profiling.reference import Reference, difference
from splitray.profiling.served_answer import ServedAnswer
from splitray.runtime.engine.engine import Engine

os.environ.setdefault("HF_HUB_OFFLINE", "1")

CONTEXT, VOCAB, LAYERS, GROUPS, COLUMNS = 8192, 300, 2, 3, 40
PROMPT, NUM_NEW = "the cat sat", 8
KEYS = {
    "token_ids", "text", "ttft_s", "tpot_s", "exchanges_per_token", "messages_per_token", "bytes_per_token",
    "wire_bytes_per_token", "driver_bytes_per_token", "epoch", "devices",
}  # fmt: skip
DEVICE_KEYS = {"weight_bytes", "kv_bytes", "checkpoint_bytes_read", "rss_anon_bytes"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model whose byte-level tokenizer gives ids to any text."""
    folder = tmp_path_factory.mktemp("models") / "model"
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<end>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    core.train_from_iterator(["the cat sat on the mat and the other cat sat on that hat"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=COLUMNS, num_hidden_layers=LAYERS, num_attention_heads=6,
        num_key_value_heads=GROUPS, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        initializer_range=0.4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bare(model: Path) -> Path:
    """The same model without its tokenizer."""
    folder = model.parent / "bare"
    shutil.copytree(model, folder)
    for path in folder.glob("*tokenizer*"):
        path.unlink()
    return folder


@pytest.fixture(scope="module")
def greedy(model: Path) -> tuple[list[int], list[int]]:
    """The prompt's ids, and what transformers adds to them."""
    whole = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = PreTrainedTokenizerFast.from_pretrained(model)(PROMPT, return_tensors="pt").input_ids
    out = whole.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_NEW, do_sample=False)
    return ids[0].tolist(), out[0, ids.shape[1] :].tolist()


@pytest.fixture(autouse=True)
def _nothing_left_running() -> Iterator[None]:
    before = set(psutil.Process().children(recursive=True))
    yield
    assert set(psutil.Process().children(recursive=True)) <= before


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def generate(model: object, *arguments: object, runtime: str = "local") -> Result:
    return run("generate", "--model", model, "--runtime", runtime, "--max-new-tokens", NUM_NEW, *arguments)


def test_the_document_has_transformers_tokens_and_every_key(model: Path, greedy: tuple[list[int], list[int]]) -> None:
    result = generate(model, "--prompt", PROMPT, "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["token_ids"] == greedy[1]
    assert document["text"] == PreTrainedTokenizerFast.from_pretrained(model).decode(greedy[1])
    assert set(document) == KEYS
    assert list(document["devices"]) == ["edge0", "cloud0"]
    for values in document["devices"].values():
        assert set(values) == DEVICE_KEYS
        assert values["rss_anon_bytes"] is None, "threads share their memory"
        assert 0 < values["weight_bytes"] <= values["checkpoint_bytes_read"]
        assert values["kv_bytes"] > 0
    assert document["exchanges_per_token"] == 2 * LAYERS + 2
    assert 0 < document["bytes_per_token"] < document["wire_bytes_per_token"]


def test_without_a_terminal_the_text_comes_first_and_whole_then_a_table(
    model: Path, greedy: tuple[list[int], list[int]]
) -> None:
    result = generate(model, "--prompt", PROMPT)
    text = PreTrainedTokenizerFast.from_pretrained(model).decode(greedy[1])
    assert result.stdout.startswith(f"{text}\n\nnew tokens")
    for word in ("time to first token", "exchanges per token", "edge0", "cloud0", "KV cache"):
        assert word in result.stdout
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_ids_work_on_a_model_without_a_tokenizer(bare: Path, greedy: tuple[list[int], list[int]]) -> None:
    ids = ",".join(map(str, greedy[0]))
    document = json.loads(generate(bare, "--prompt-ids", ids, "--json").stdout)
    assert (document["token_ids"], document["text"]) == (greedy[1], None)
    shown = generate(bare, "--prompt-ids", ids).stdout
    assert shown.startswith(" ".join(map(str, greedy[1])))


def test_generation_stops_at_the_end_of_sequence_of_the_generation_config(
    model: Path, greedy: tuple[list[int], list[int]], tmp_path: Path
) -> None:
    stop = greedy[1][3]
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [stop, 299]}))
    document = json.loads(generate(tmp_path, "--prompt", PROMPT, "--json").stdout)
    assert document["token_ids"] == greedy[1][: greedy[1].index(stop) + 1]


def test_a_seed_gives_the_same_sample_on_any_number_of_devices(model: Path) -> None:
    def sample(devices: int, seed: int) -> list[int]:
        options = ("--temperature", 1.3, "--top-k", 50, "--top-p", 0.9, "--repetition-penalty", 1.1, "--json")
        return json.loads(generate(model, "--prompt", PROMPT, "--devices", devices, "--seed", seed, *options).stdout)[
            "token_ids"
        ]

    assert sample(1, 5) == sample(2, 5) != sample(2, 6)


def test_more_devices_than_pieces_work(model: Path, greedy: tuple[list[int], list[int]]) -> None:
    document = json.loads(generate(model, "--prompt", PROMPT, "--devices", GROUPS + 3, "--json").stdout)
    assert document["token_ids"] == greedy[1]
    assert len(document["devices"]) == GROUPS + 3


def _placement(**changes: Any) -> dict[str, Any]:
    layer = {
        "attention": {"edge0": [[0, 1]], "cloud0": [[1, GROUPS]]},
        "ffn": {"edge0": [[0, 10]], "cloud0": [[10, COLUMNS]]},
    }
    return {"layers": [layer] * LAYERS, "embedding": ["edge0"], "head": {"cloud0": [[0, VOCAB]]}, **changes}


def _file(folder: Path, name: str, document: object) -> str:
    path = folder / name
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return str(path)


def _topology(**changes: object) -> dict[str, object]:
    def device(name: str, tier: str) -> dict[str, object]:
        rates = {"memory_bytes": 1e9, "compute_flops": 1e10, "memory_bandwidth_bytes_per_s": 1e10}
        return {"id": name, "tier": tier, **rates, **changes}

    link = {"between": ["edge0", "cloud0"], "bandwidth_bytes_per_s": 1e8, "rtt_s": 0.001}
    return {"devices": [device("edge0", "edge"), device("cloud0", "cloud")], "links": [link]}


def test_files_decide_devices_and_pieces(model: Path, greedy: tuple[list[int], list[int]], tmp_path: Path) -> None:
    files = (
        "--placement",
        _file(tmp_path, "p.yaml", _placement()),
        "--topology",
        _file(tmp_path, "t.yaml", _topology()),
    )
    document = json.loads(generate(model, "--prompt", PROMPT, "--json", *files).stdout)
    assert document["token_ids"] == greedy[1]
    assert document["devices"]["cloud0"]["weight_bytes"] > document["devices"]["edge0"]["weight_bytes"]


def _without(model: Path, folder: Path, change: Callable[[Path], object]) -> Path:
    shutil.copytree(model, folder / "broken")
    change(folder / "broken" / "model.safetensors")
    return folder / "broken"


def _truncate(weights: Path) -> None:
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


HEADLESS = {**_placement()["layers"][0], "attention": {"edge0": [[0, 1]], "cloud0": [[2, GROUPS]]}}
STRANGER = {**_placement()["layers"][0], "ffn": {"edge0": [[0, 10]], "cloud9": [[10, COLUMNS]]}}
# Arguments after `generate --model MODEL --prompt TEXT` (or in their place) -> words of the error.
REFUSED: dict[str, tuple[Callable[[Path, Path], list[object]], list[str]]] = {
    "neither a prompt nor ids": (lambda m, t: ["--model", m], ["either --prompt or --prompt-ids", "neither"]),
    "a prompt and ids": (lambda m, t: ["--model", m, "--prompt", "a", "--prompt-ids", "1"], ["both"]),
    "an empty prompt": (lambda m, t: ["--model", m, "--prompt", ""], ["at least one token", "none"]),
    "no ids": (lambda m, t: ["--model", m, "--prompt-ids", ","], ["at least one token"]),
    "ids that are no numbers": (lambda m, t: ["--model", m, "--prompt-ids", "1,b"], ["whole numbers", "'1,b'"]),
    "ids outside the vocabulary": (lambda m, t: ["--model", m, "--prompt-ids", "1,300"], ["[0, 300)", "300"]),
    "text without a tokenizer": (lambda m, t: ["--model", m.parent / "bare", "--prompt", "a"], ["use --prompt-ids"]),
    "a prompt past the context": (
        lambda m, t: ["--model", m, "--prompt-ids", ",".join(["5"] * CONTEXT)],
        [f"context of {CONTEXT}", "shorten the prompt"],
    ),
    "no such model": (lambda m, t: ["--model", t / "none", "--prompt", "a"], ["folder", "config.json"]),
    "no weights": (lambda m, t: ["--model", _without(m, t, Path.unlink), "--prompt", "a"], ["safetensors"]),
    "truncated weights": (
        lambda m, t: ["--model", _without(m, t, _truncate), "--prompt", "a"],
        ["complete safetensors file", "copy the checkpoint again"],
    ),
    "a head that nobody holds": (
        lambda m, t: ["--model", m, "--prompt", "a", "--placement",
                      _file(t, "p.yaml", _placement(layers=[HEADLESS] * LAYERS))],
        ["layer 0 attention", "[1, 2) on no device", "add the missing range"],
    ),
    "an unknown device": (
        lambda m, t: ["--model", m, "--prompt", "a", "--placement",
                      _file(t, "p.yaml", _placement(layers=[STRANGER] * LAYERS))],
        ["edge0", "cloud9", "correct the device's name"],
    ),
    "a placement file that is none": (
        lambda m, t: ["--model", m, "--prompt", "a", "--placement", _file(t, "p.yaml", "{")],
        [":2: expected a YAML document"],
    ),
    "a planner and a placement": (
        lambda m, t: ["--model", m, "--prompt", "a", "--planner", "even", "--placement",
                      _file(t, "p.yaml", _placement())],
        ["either a planner or a placement", "leave one out"],
    ),
    "a planner that does not exist": (lambda m, t: ["--model", m, "--prompt", "a", "--planner", "evne"], ["even?"]),
    "a number of devices and a topology": (
        lambda m, t: ["--model", m, "--prompt", "a", "--devices", 2, "--topology", _file(t, "t.yaml", _topology())],
        ["leave one out"],
    ),
    "no device": (lambda m, t: ["--model", m, "--prompt", "a", "--devices", 0], ["at least 1"]),
    "a model that does not fit": (
        lambda m, t: ["--model", m, "--prompt", "a", "--topology",
                      _file(t, "t.yaml", _topology(memory_bytes=1e5))],
        ["memory of edge0", "100,000 bytes", "move pieces"],
    ),
    "no new token": (lambda m, t: ["--model", m, "--prompt", "a", "--max-new-tokens", 0], ["at least 1"]),
    "a temperature below zero": (lambda m, t: ["--model", m, "--prompt", "a", "--temperature", -1], ["0 (greedy)"]),
    "an unknown dtype": (lambda m, t: ["--model", m, "--prompt", "a", "--dtype", "int3"], ["float32", "--help"]),
    "an unknown option": (lambda m, t: ["--model", m, "--promt", "a"], ["--promt", "--help"]),
    "no model named": (lambda m, t: ["--prompt", "a"], ["--model", "--help"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_code_2_and_what_to_do(
    arguments: Callable[[Path, Path], list[object]], words: list[str], model: Path, bare: Path, tmp_path: Path
) -> None:
    given = arguments(model, tmp_path)
    result = run("generate", "--runtime", "local", *given, "--json")
    assert result.exit_code == 2
    told = json.loads(result.stdout)["error"]
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1, "one paragraph"
    for word in words:
        assert word in result.stderr
        assert word in told["message"]


def test_an_unknown_command_is_refused_with_code_2() -> None:
    result = run("genrate")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "genrate" in result.stderr


@pytest.mark.usefixtures("forked_devices")
def test_a_device_that_dies_in_the_middle_changes_no_token(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, asked = Engine.stream, ("--prompt", PROMPT, "--max-new-tokens", 100, "--json")
    wanted = json.loads(generate(model, *asked).stdout)

    def dying(self: Engine, *arguments: Any) -> Iterator[int]:
        for number, token_id in enumerate(stream(self, *arguments)):
            if number == 2:
                os.kill(self.fleet.pid("cloud0"), signal.SIGKILL)  # type: ignore[attr-defined]
            yield token_id

    monkeypatch.setattr(Engine, "stream", dying)
    result = generate(model, *asked, runtime="process")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["token_ids"] == wanted["token_ids"]


def test_a_device_that_dies_at_start_ends_the_run_with_code_1(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    dead = tmp_path / "python"
    dead.write_text("#!/bin/sh\nread order\nexit 3\n")
    dead.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(dead))
    result = generate(model, "--prompt", PROMPT, "--json", runtime="process")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "DeviceLost"
    assert "exit code 3" in result.stderr


def _start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "splitray.commands.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.full
def test_as_a_program_it_prints_one_document_and_not_a_word_more(
    model: Path, greedy: tuple[list[int], list[int]]
) -> None:
    options = ("--prompt", PROMPT, "--max-new-tokens", NUM_NEW, "--devices", 1, "--json")
    with _start("generate", "--model", model, *options) as program:
        out, err = program.communicate(timeout=100)
    assert (program.returncode, err) == (0, "")
    document = json.loads(out)
    assert document["token_ids"] == greedy[1]
    assert all(d["rss_anon_bytes"] > 1e7 for d in document["devices"].values())


def test_ctrl_c_ends_the_program_and_its_device_processes(model: Path) -> None:
    with _start(
        "generate", "--model", model, "--prompt-ids", "7", "--max-new-tokens", CONTEXT - 1, "--json"
    ) as program:
        started = _wait_for_devices(program, 2)
        os.killpg(program.pid, signal.SIGINT)
        out, err = program.communicate(timeout=60)
    assert program.returncode == 130
    assert json.loads(out)["error"]["type"] == "KeyboardInterrupt"
    assert err == "error: interrupted; everything that was started has been stopped\n"
    _, left = psutil.wait_procs(started, timeout=5)
    assert not left


def test_sigterm_ends_the_program_as_ctrl_c_does(model: Path) -> None:
    options = ("--prompt-ids", "7", "--runtime", "local", "--max-new-tokens", CONTEXT - 1)
    with _start("generate", "--model", model, *options) as program:
        while psutil.Process(program.pid).memory_info().rss < 2e8:  # until it has read torch
            time.sleep(0.1)
        program.send_signal(signal.SIGTERM)
        out, err = program.communicate(timeout=60)
    assert (program.returncode, out) == (143, ""), err
    assert err == "error: terminated; everything that was started has been stopped\n"


def _wait_for_devices(program: subprocess.Popen[str], number: int) -> list[psutil.Process]:
    """The device processes, as soon as they listen."""
    deadline = time.monotonic() + 60
    while True:
        assert program.poll() is None, "it ended by itself"
        found = psutil.Process(program.pid).children(recursive=True)
        if len(found) == number and all(p.net_connections("tcp") for p in found):
            return found
        assert time.monotonic() < deadline, "no device process came up"
        time.sleep(0.2)


def test_help_loads_neither_torch_nor_ray() -> None:
    code = "import sys, splitray.commands.cli; print({'torch', 'ray', 'transformers', 'fastapi'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", ["generate", "serve", "demo", "doctor", "bench"])
def test_every_command_explains_itself(command: str) -> None:
    assert run("--help").exit_code == 0
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"splitray {command}" in result.stdout.replace("root", "splitray")


# A model of which only the architecture is known: the program reads no checkpoint and needs no torch for it.
PLAN = ["plan", "--model", "gpt2-xl", "--topology", "TOPOLOGY", "--planner", "even"]


@pytest.mark.parametrize("both", [False, True], ids=["of stdout", "of stdout and stderr"])
@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["bench", "--help"], [*PLAN, "--json"], PLAN],
    ids=["help", "help of a command", "a document", "a table"],
)
def test_a_reader_who_is_gone_ends_the_program_quietly(arguments: list[str], both: bool, tmp_path: Path) -> None:
    where = _file(tmp_path, "t.yaml", _topology(memory_bytes=1e11))
    read, write = os.pipe()
    os.close(read)
    program = subprocess.run(
        [sys.executable, "-m", "splitray.commands.cli", *(where if a == "TOPOLOGY" else a for a in arguments)],
        stdout=write, stderr=write if both else subprocess.PIPE, text=True, timeout=300, check=False,
    )  # fmt: skip
    os.close(write)
    assert (program.returncode, program.stderr or "") == (141, "")


@pytest.mark.parametrize("output", ["| head -1", "2>&1 | head -1", "| true", "--json 2>&1 | true"])
def test_head_gets_its_line_and_nobody_complains(output: str, tmp_path: Path) -> None:
    where = _file(tmp_path, "t.yaml", _topology(memory_bytes=1e11))
    command = " ".join([sys.executable, "-m splitray.commands.cli", *PLAN]).replace("TOPOLOGY", where)
    shell = subprocess.run(
        ["bash", "-c", f"{command} {output}; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=300,
        check=False,
    )  # fmt: skip
    assert shell.stderr == ""
    assert int(shell.stdout.splitlines()[-1]) in (0, 141), shell.stdout
    assert len(shell.stdout.splitlines()) == 1 + ("head" in output)


@pytest.mark.parametrize(
    ("output", "code", "told"),
    [
        (">/dev/full", 1, "error: standard output: No space left on device; give it a place with room\n"),
        ("--json >/dev/full", 1, "error: standard output: No space left on device; give it a place with room\n"),
        (">/dev/full 2>/dev/full", 1, ""),
        (">&- 2>&-", 0, ""),
        (">/dev/null 2>/dev/full", 0, ""),
    ],
)
def test_a_full_or_closed_output_is_told_in_a_line(output: str, code: int, told: str, tmp_path: Path) -> None:
    where = _file(tmp_path, "t.yaml", _topology(memory_bytes=1e11))
    command = " ".join([sys.executable, "-m splitray.commands.cli", *PLAN]).replace("TOPOLOGY", where)
    shell = subprocess.run(
        ["bash", "-c", f"{command} {output}"], capture_output=True, text=True, timeout=300, check=False
    )
    assert (shell.returncode, shell.stdout, shell.stderr) == (code, "", told)


def test_messages_that_nobody_reads_cost_no_result(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    program = subprocess.run(
        [sys.executable, "-m", "splitray.commands.cli", *PLAN, "--json"], stdout=subprocess.PIPE,
        stderr=write, text=True, timeout=300, check=False,
    )  # fmt: skip
    os.close(write)
    assert program.returncode == 2
    assert "TopologyError" in json.loads(program.stdout)["error"]["type"]


def test_a_pipe_to_a_process_of_ours_that_breaks_is_an_error_to_be_told(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[int]:
        raise BrokenPipeError("to a device")
        yield

    monkeypatch.setattr(Engine, "stream", broken)
    result = generate(model, "--prompt", PROMPT)
    assert result.exit_code == 1
    assert "a process that was started has ended too early" in result.stderr


@pytest.mark.parametrize(("command", "suites"), [("bench", ["engine", "predicted", "simulator", "faults", "families",
                                                            "weights"]),
                                                 ("evaluate", ["planners", "splitwise", "replacement",
                                                               "layer-splitting"])])  # fmt: skip
def test_suites_are_named_in_the_help_and_in_the_error(command: str, suites: list[str]) -> None:
    told, refused = run(command, "--help").stdout, run(command, "--suite", suites[0][:-1])
    assert refused.exit_code == 2
    assert f"did you mean {suites[0]}?" in refused.stderr
    for suite in suites:
        assert f"{suite}:" in told
        assert suite in refused.stderr


def test_serve_refuses_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = run("serve", "--port", taken.getsockname()[1])
    assert result.exit_code == 2
    assert "--port" in result.stderr


def test_any_port_is_one_that_no_connection_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray opens many before Serve listens, and one of them had the port that was chosen."""
    assert free_port("127.0.0.1", 0) not in range(32_768, 61_000)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first, other = taken.getsockname()[1], free_port("127.0.0.1", 0)
        monkeypatch.setattr(secrets.SystemRandom, "sample", lambda *_: [first, other])
        assert free_port("127.0.0.1", 0) == other
        monkeypatch.setattr(secrets.SystemRandom, "sample", lambda *_: [first])
        with pytest.raises(InputError, match="a free port"):
            free_port("127.0.0.1", 0)
    with pytest.raises(InputError, match="address of this machine"):
        free_port("203.0.113.77", 0)


REFERENCE = Reference(token_ids=(4, 5, 0), pieces=(" a", " cat"))


@pytest.mark.parametrize(
    ("pieces", "num_tokens", "words"),
    [
        ((" a", " cat"), 3, None),
        ((" a", " hat"), 3, "piece 1 of the text is ' hat' and not ' cat'"),
        ((" a",), 2, "2 came and not 3"),
        ((" a", " cat"), 2, "2 came and not 3"),
        ((" a", " cat", " sat"), 3, "tokens differ"),
    ],
    ids=["the same", "another word", "too short", "no end of sequence", "too long"],
)
def test_the_demo_names_the_first_difference(pieces: tuple[str, ...], num_tokens: int, words: str | None) -> None:
    found = difference(
        ServedAnswer(pieces=pieces, num_tokens=num_tokens, ttft_s=0.1, tpot_s=None, longest_gap_s=0.0), REFERENCE
    )
    assert found is None if words is None else words in str(found)


def test_a_text_is_scored_whole_and_cut_alike(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat and the other cat sat on that hat " * 4)
    base = ["perplexity", "--model", str(model), "--text", str(text)]
    whole, cut, coded = (
        json.loads(CliRunner().invoke(app, [*base, "--window", "40", "--json", *more]).stdout)
        for more in ((), ("--cut", "1"), ("--cut", "1", "--codec", "int4"))
    )
    assert {"perplexity", "tokens", "channel", "codec", "cut", "placement", "seed"} <= set(whole)
    assert cut["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-5)
    assert coded["perplexity"] != pytest.approx(whole["perplexity"], rel=1e-5)
    wrong = CliRunner().invoke(app, [*base, "--cut", "9"])
    assert wrong.exit_code == 2 and "cut" in wrong.stderr
    short = CliRunner().invoke(app, base)
    assert short.exit_code == 2 and "window" in short.stderr
