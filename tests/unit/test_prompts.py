"""A file of prompts: what its lines may say, what is written of each, and that a run that was ended goes on."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest
from fake_engine import FakeEngine
from typer.testing import CliRunner, Result

from splitray.commands.cli import app
from splitray.errors import DeviceLost, InputError, Unsampled
from splitray.prompts.answering import RequestMaker, answers
from splitray.prompts.answers_file import AnswersFile
from splitray.prompts.prompt_line import PromptLine
from splitray.prompts.prompts_file import entries, num_prompts, prompts_file
from splitray.prompts.run import PromptsRun, prompts_run
from splitray.runtime.engine.engine import Engine
from splitray.runtime.launch import SHIPPED
from splitray.runtime.sampling import Sampling
from splitray.user_file import UserFile

ROOT = Path(__file__).resolve().parents[2]
SAMPLING = Sampling(max_new_tokens=60, stop_ids=(0,))
ASKED = {"prompts": "abc", "seed": 0}
SAID = [json.dumps({"prompt": f"prompt {i} é"} | ({"id": f"n{i}"} if i % 2 else {})) for i in range(6)]
SAID[3] = "{"


def written(folder: Path, content: str | bytes, name: str = "prompts.jsonl") -> UserFile:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return UserFile(path, "prompts", "correct the line")


def answered(folder: Path, lines: Sequence[str], engine: FakeEngine | None = None) -> list[dict[str, Any]]:
    real = cast(Engine, engine or FakeEngine())
    file = written(folder, "\n".join(lines))
    return list(answers(real, entries(file), RequestMaker(real, SAMPLING), lambda: None))


def test_lines_in_all_their_forms_are_prompts(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"prompt": "a", "id": 7}\r\n\r\n  \n"b"\n{"prompt": [1, 2]}\n{"prompt_ids": [3]}\r\n"last"'
    file = written(tmp_path, content)
    found = list(entries(file))
    assert [(e.index, e.line, e.id) for e in found] == [
        (0, 1, 7), (1, 4, None), (2, 5, None), (3, 6, None), (4, 7, None),
    ]  # fmt: skip
    prompts = [e.prompt for e in found if isinstance(e.prompt, PromptLine)]
    assert [p.prompt_ids or p.prompt for p in prompts] == ["a", "b", [1, 2], [3], "last"]
    assert num_prompts(file) == 5
    assert list(entries(file, first=3)) == found[3:]


REFUSED = {
    "no JSON": ("nonsense", "prompts.jsonl:1: expected a JSON document"),
    "cut off": ('{"prompt": "a', "expected a JSON document"),
    "a number": ("3", "Expected `object`, got `int`"),
    "no prompt": ("{}", "expected one of prompt, prompt_ids and messages, got none"),
    "two prompts": ('{"prompt": "a", "prompt_ids": [1]}', "got prompt and prompt_ids"),
    "an empty prompt": ('""', "expected at least one token"),
    "no ids": ('{"prompt_ids": []}', "expected at least one token"),
    "ids of no token": ('{"prompt_ids": [999]}', r"expected ids in \[0, "),
    "ids and a text": ('{"prompt": [1, "a"]}', r"Expected `int`, got `str` - at `\$.prompt\[1\]`"),
    "true for an id": ('{"prompt": [true]}', "got `bool`"),
    "no messages": ('{"messages": []}', "messages: expected at least one"),
    "an image": ('{"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}', "image_url"),
    "a role of no one": ('{"messages": [{"role": "tool", "content": ""}]}', "tool"),
    "a template that says no": (
        '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}',
        "system must come first",
    ),
    "a name with a slip": ('{"prompt": "a", "max_token": 3}', r"did you mean max_tokens\?"),
    "no new tokens": ('{"prompt": "a", "max_tokens": 0}', "max_tokens"),
    "half a token": ('{"prompt": "a", "max_tokens": 1.5}', r"Expected `int \| null`, got `float`"),
    "too long an answer": ('{"prompt": "a", "max_tokens": 200}', "context of 200 tokens, got 1 . 200"),
    "no number": ('{"prompt": "a", "temperature": NaN}', "temperature: expected 0"),
    "an endless number": ('{"prompt": "a", "temperature": 1e999}', "temperature: expected 0"),
    "a probability of 2": ('{"prompt": "a", "top_p": 2}', "top_p: expected above 0"),
    "a seed without end": (f'{{"prompt": "a", "seed": {10**40}}}', "seed: expected a number of 64 bits"),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "'prompt' twice"),
    "a list for an id": ('{"prompt": "a", "id": [1]}', "id"),
    "an empty stop": ('{"prompt": "a", "stop": [""]}', "none of them empty"),
    "many stops": ('{"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}', "up to 4 strings"),
    "a template's option without messages": ('{"prompt": "a", "add_generation_prompt": true}', "expected messages"),
    "brackets": ("[" * 100_000, "nested too deep"),
    "deep keys": ('{"a":' * 100_000, "nested too deep"),
    "half a pair": ('{"prompt": "\\ud800"}', "lone surrogate"),
    "half a pair in a message": ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
    "half a pair in a name": ('{"prompt": "a", "\\ud800": 1}', "lone surrogate"),
    "many values": ("[" + "1," * 300_000 + "1]", "at most 250,000 values"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_prompt_becomes_an_error_in_its_place(kind: str, tmp_path: Path) -> None:
    line, told = REFUSED[kind]
    found = answered(tmp_path, [line, '{"prompt": "good", "id": "b"}'])
    assert [a["index"] for a in found] == [0, 1]
    assert "text" not in found[0] and found[0]["error"]["line"] == 1
    assert re.search(told, found[0]["error"]["message"])
    assert found[1]["text"] == "GOOD" and found[1]["id"] == "b"


def test_bytes_that_are_no_text_are_refused_on_their_line(tmp_path: Path) -> None:
    first, second = entries(written(tmp_path, b'{"prompt": "\xff"}\n"b"\n'))
    assert isinstance(first.prompt, InputError) and "0xff" in str(first.prompt)
    assert isinstance(second.prompt, PromptLine)


def test_the_id_of_a_bad_line_is_kept(tmp_path: Path) -> None:
    (found,) = answered(tmp_path, ['{"id": "x", "prompt": 3}'])
    assert found["id"] == "x" and "error" in found


def test_a_line_without_end_is_refused_alone_and_takes_little_memory(tmp_path: Path) -> None:
    file = written(tmp_path, b"")
    with open(file.path, "r+b") as raw:
        raw.seek(100_000_000)
        raw.write(b'\n{"prompt": "b"}\n')
    tracemalloc.start()
    try:
        first, second = entries(file)
        assert tracemalloc.get_traced_memory()[1] < 90e6, "less than the line"
    finally:
        tracemalloc.stop()
    assert isinstance(first.prompt, InputError) and "at most 20,000,000 bytes" in str(first.prompt)
    assert isinstance(second.prompt, PromptLine) and (second.index, second.line) == (1, 2)


UNUSABLE = {
    "an array": (b' \n[{"prompt": "a"}]', "jq -c"),
    "UTF-16": ('{"prompt": "a"}'.encode("utf-16"), "save it in UTF-8"),
    "zstd": (b"\x28\xb5\x2f\xfd....", "zstd -d"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_of_another_kind_is_refused_whole(kind: str, tmp_path: Path) -> None:
    content, told = UNUSABLE[kind]
    with pytest.raises(InputError, match=told):
        num_prompts(written(tmp_path, content))


def test_an_answer_has_the_names_of_the_api(tmp_path: Path) -> None:
    engine = FakeEngine()
    found = answered(
        tmp_path,
        [
            '{"prompt": "the cat", "id": "a", "temperature": 1, "seed": 5, "top_p": 0.5, "max_tokens": 3}',
            '{"prompt": "the cat sat", "stop": "AT S"}',
            '{"prompt": "the cat sat", "stop": ["AT S"], "include_stop_str_in_output": true}',
            '{"messages": [{"role": "developer", "content": "hi"}]}',
        ],
        engine,
    )
    assert found[0] == {
        "index": 0, "id": "a", "text": "THE", "token_ids": engine.tokenizer("THE")["input_ids"],
        "finish_reason": "length", "usage": {"prompt_tokens": len(engine.runs[0].prompt_ids), "completion_tokens": 3,
                                             "total_tokens": len(engine.runs[0].prompt_ids) + 3},
    }  # fmt: skip
    assert (found[1]["text"], found[1]["finish_reason"]) == ("THE C", "stop")
    assert found[2]["text"] == "THE CAT S"
    assert found[3]["text"].startswith("<|IM_START|>SYSTEM\nHI") and found[3]["finish_reason"] == "stop"
    own, rest = engine.runs[0].sampling, engine.runs[1].sampling
    assert (own.temperature, own.seed, own.top_p, own.max_new_tokens, own.stop_ids) == (1.0, 5, 0.5, 3, (0,))
    assert rest == SAMPLING
    assert all(run.ended or run.closed_early for run in engine.runs)


def test_without_a_tokenizer_ids_are_answered_with_ids(tmp_path: Path) -> None:
    engine = FakeEngine(tokenizer=None, say=lambda ids: [*ids, 0])
    found = answered(tmp_path, ['{"prompt_ids": [4, 5]}', '"text"', '{"prompt_ids": [4], "stop": "a"}'], engine)
    assert (found[0]["token_ids"], found[0]["text"]) == ([4, 5, 0], None)
    assert "no tokenizer" in found[1]["error"]["message"] and "tokenizer" in found[2]["error"]["message"]


def test_a_prompt_that_gives_no_token_is_an_error_and_the_others_go_on(tmp_path: Path) -> None:
    def say(ids: list[int]) -> list[int]:
        if len(ids) == 1:
            raise Unsampled("no token can be chosen")
        return [5]

    found = answered(tmp_path, ['{"prompt_ids": [1]}', '{"prompt_ids": [1, 2]}'], FakeEngine(say=say))
    assert found[0]["error"] == {"type": "Unsampled", "message": "no token can be chosen", "line": 1}
    assert found[1]["token_ids"] == [5]


def run_on(folder: Path, engine: FakeEngine | Callable[[], FakeEngine], **options: Any) -> PromptsRun:
    """A run over SAID into `answers.jsonl`."""
    file = written(folder, "\n".join(SAID))
    asked, anew = options.get("asked", ASKED), options.get("anew", False)
    with prompts_run(str(file.path), folder / "answers.jsonl", io.StringIO(), lambda _: asked, anew=anew) as run:

        def launch() -> tuple[Engine, RequestMaker]:
            real = cast(Engine, engine if isinstance(engine, FakeEngine) else engine())
            return real, RequestMaker(real, SAMPLING)

        run.go_on(launch, options.get("tell", lambda _: None))
    return run


def test_a_run_that_was_ended_at_any_byte_goes_on_to_the_same_answers(tmp_path: Path) -> None:
    run_on(tmp_path, FakeEngine())
    out = tmp_path / "answers.jsonl"
    whole = out.read_bytes()
    assert [json.loads(line)["index"] for line in whole.splitlines()] == list(range(6))
    for end in range(0, len(whole), 29):
        out.write_bytes(whole[:end])
        engine = FakeEngine()
        run = run_on(tmp_path, engine)
        assert out.read_bytes() == whole
        assert (run.file.done, run.file.errors) == (6, 1)
        lines = whole[:end].count(b"\n")
        assert len(engine.runs) == sum(i != 3 for i in range(lines, 6)), "what was answered is not run again"
    out.write_bytes(whole[:400] + bytes(100))  # as a file system may leave it when the power fails
    run_on(tmp_path, FakeEngine())
    assert out.read_bytes() == whole


def test_nothing_is_launched_where_all_is_answered(tmp_path: Path) -> None:
    run_on(tmp_path, FakeEngine())

    def never() -> FakeEngine:
        raise AssertionError

    assert run_on(tmp_path, never).told == "6 of 6 prompts answered, 1 with an error"


def test_a_lost_device_ends_the_run_behind_the_last_answer(tmp_path: Path) -> None:
    spoken: list[int] = []

    def say(ids: list[int]) -> list[int]:
        spoken.append(1)
        if len(spoken) == 3:
            raise DeviceLost("edge0 died")
        return [5, 0]

    with pytest.raises(DeviceLost):
        run_on(tmp_path, FakeEngine(say=say))
    assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == 2
    assert run_on(tmp_path, FakeEngine(say=lambda _: [5, 0])).file.done == 6


def test_progress_tells_tokens_a_second(tmp_path: Path) -> None:
    told: list[str] = []
    run = run_on(tmp_path, FakeEngine(say=lambda _: [5, 0]), tell=told.append)
    assert run.new_tokens == 10 and run.tokens_per_s > 0
    assert told[0].startswith("0 of 6 prompts answered, ") and told[-1].endswith(" tokens/s")
    assert run.document.keys() == {"prompts", "answered", "errors", "new_tokens", "tokens_per_s"}


def test_answers_of_something_else_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("mine\n")
    with pytest.raises(InputError, match="a new file, or one that this command has begun"):
        run_on(tmp_path, FakeEngine())
    assert out.read_text() == "mine\n"
    run_on(tmp_path, FakeEngine(), anew=True)
    whole = out.read_bytes()
    with pytest.raises(InputError, match="a file for seed 1, got .*answers.jsonl has the results of seed 0; .*--anew"):
        run_on(tmp_path, FakeEngine(), asked={**ASKED, "seed": 1})
    assert out.read_bytes() == whole
    run_on(tmp_path, FakeEngine(reply=lambda _: "other"), asked={**ASKED, "seed": 1}, anew=True)
    assert out.read_bytes() != whole and out.read_bytes().count(b"\n") == 6
    before = out.read_bytes()
    prompts = written(tmp_path, '[{"prompt": "a"}]', "array.json")
    with pytest.raises(InputError, match="jq"):
        ExitStack().enter_context(prompts_run(str(prompts.path), out, io.StringIO(), lambda _: ASKED, anew=True))
    assert out.read_bytes() == before, "--anew costs nothing where nothing can begin"
    out.write_bytes(whole.replace(b'"index": 1', b'"index": 9'))
    with pytest.raises(InputError, match=r"answers.jsonl:2: expected the answer of index 1"):
        run_on(tmp_path, FakeEngine(), asked={**ASKED, "seed": 1})
    out.unlink()
    assert run_on(tmp_path, FakeEngine(), asked={**ASKED, "seed": 2}).file.done == 6


def test_standard_input_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'"a"\n"b"')))
    with prompts_file("-") as file:
        assert num_prompts(file) == 2
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(InputError, match="it is closed"), prompts_file("-"):
        pass


# The command.

COMMAND = ("generate", "--model", "tiny", "--runtime", "local", "--devices", "1", "--max-new-tokens", "8")


def generate(*arguments: object, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, [*COMMAND, *map(str, arguments)], input=stdin)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prompts and the answers of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("prompts")
    lines: list[Any] = [{"prompt": f"The list {i} of", "seed": i, "temperature": 1.2, "id": i} for i in range(30)]
    lines[1] = {"prompt": ""}
    lines[2] = {"prompt": "The module os", "temperature": 0.0}
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = generate("--prompts", folder / "prompts.jsonl", "--out", folder / "answers.jsonl", "--json")
    assert done.exit_code == 1, done.output
    document = json.loads(done.stdout)
    assert (document["prompts"], document["answered"], document["errors"]) == (30, 30, 1)
    assert "30 of 30 prompts answered, 1 with an error" in done.stderr
    return folder


def test_each_prompt_has_the_answer_that_it_has_alone(whole: Path) -> None:
    found = [json.loads(line) for line in (whole / "answers.jsonl").read_text().splitlines()]
    assert [a["index"] for a in found] == list(range(30))
    for index, options in ((2, ()), (7, ("--temperature", 1.2, "--seed", 7))):
        prompt = "The module os" if index == 2 else "The list 7 of"
        alone = json.loads(generate("--prompt", prompt, *options, "--json").stdout)
        assert (alone["token_ids"], alone["text"]) == (found[index]["token_ids"], found[index]["text"])


def test_standard_output_is_nothing_but_answers(whole: Path) -> None:
    lines = (whole / "prompts.jsonl").read_text().splitlines()[:3]
    done = generate("--prompts", "-", stdin="\n".join(lines))
    assert done.exit_code == 1, done.output
    expected = (whole / "answers.jsonl").read_text().splitlines()[:3]
    found = done.stdout.splitlines()
    assert [found[0], found[2]] == [expected[0], expected[2]] and len(found) == 3


def test_a_run_that_ctrl_c_ended_goes_on_by_the_same_command_and_no_other(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, add = tmp_path / "answers.jsonl", AnswersFile.add

    def interrupted(file: AnswersFile, answer: dict[str, Any]) -> None:
        if file.done == 4:
            raise KeyboardInterrupt
        add(file, answer)

    command = ("--prompts", whole / "prompts.jsonl", "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(AnswersFile, "add", interrupted)
        ended = generate(*command)
    assert ended.exit_code == 130 and re.search("4 of 30 prompts answered.*the same command goes on", ended.stderr)
    assert out.read_bytes().count(b"\n") == 4
    for options, told in ((("--top-k", 3), "top_k 3"), (("--model", bare(tmp_path)), "for model")):
        refused = generate(*command, *options)
        assert refused.exit_code == 2 and told in " ".join(refused.stderr.split())
    assert generate(*command, "--devices", 2).exit_code == 1, "tokens do not depend on it"
    assert out.read_bytes() == (whole / "answers.jsonl").read_bytes()


def bare(folder: Path) -> Path:
    """The shipped model without its chat template."""
    return Path(shutil.copytree(SHIPPED, folder / "model", ignore=shutil.ignore_patterns("*.jinja")))


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_program_that_a_signal_ended_goes_on(whole: Path, number: int, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    arguments = ["--prompts", str(whole / "prompts.jsonl"), "--out", str(out)]
    code = "from splitray.commands.program import main; main()"
    program = [sys.executable, "-c", code, *COMMAND, *arguments]
    with subprocess.Popen(program, cwd=ROOT, stderr=subprocess.PIPE, text=True) as run:
        until = time.monotonic() + 300
        while (not out.exists() or out.read_bytes().count(b"\n") < 3) and time.monotonic() < until:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(number)
        assert run.stderr is not None
        told = run.stderr.read()
    assert 3 <= out.read_bytes().count(b"\n") < 30, "it was ended in the middle"
    if number == signal.SIGINT:
        assert run.returncode == 130 and "the same command goes on" in told
    assert generate(*arguments).exit_code == 1
    assert out.read_bytes() == (whole / "answers.jsonl").read_bytes()


BESIDE = {
    "a prompt, too": ("--prompts", "x", "--prompt", "a"),
    "ids, too": ("--prompts", "x", "--prompt-ids", "1"),
    "a file for one answer": ("--prompt", "a", "--out", "x"),
    "one answer anew": ("--prompt", "a", "--anew"),
    "room for one": ("--prompt", "a", "--context", 9),
    "a document between answers": ("--prompts", "x", "--json"),
    "standard output anew": ("--prompts", "x", "--anew"),
    "a file that is not there": ("--prompts", "nowhere.jsonl"),
    "a folder": ("--prompts", "/"),
    "a file that cannot be written": ("--prompts", "x", "--out", "/proc/x"),
    "the prompts for the answers": ("--prompts", "x", "--out", "./x", "--anew"),
    "no new tokens": ("--prompts", "x", "--max-new-tokens", 0),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_cannot_be_asked_for_is_refused_before_anything_starts(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").write_text('"a"\n')
    result = generate(*BESIDE[kind])
    assert result.exit_code == 2, result.output
    assert (tmp_path / "x").read_text() == '"a"\n'
