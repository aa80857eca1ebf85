"""A dialogue in chat templates as people write them: nothing is left out, and whatever they do is told in time."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fake_engine import byte_tokenizer

from splitray.errors import InputError
from splitray.text.chat import chat_text
from splitray.text.template_processes import template_processes

STRINGS = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
PARTS = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'text' %} {{ c['text'] }}{% endif %}{% endfor %}{{ '\n' }}{% endfor %}"
)
BOTH = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}<{{ c.text }}>{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
)
MACRO = (
    "{% macro say(it) %}{% if it is string %}{{ it }}{% else %}{% for c in it %}{{ c.text }};{% endfor %}{% endif %}"
    "{% endmacro %}{% for m in messages %}{{ say(m.content) }}\n{% endfor %}"
)
MACRO_OF_PARTS = (
    "{% macro say(it) %}{% for c in it %}{{ c.text }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}{{ say(m.content) }}\n{% endfor %}"
)
FIRST_PART = "{% for m in messages %}{{ m.content if m.content is string else m.content[0].text }}\n{% endfor %}"
SYSTEM_STRING_USER_PARTS = (
    "{{ messages[0].content }}\n{% for m in messages[1:] %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
)
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
CONTROL_WORDS = (
    "{% for m in messages %}{{ m.content.replace('/think', '').replace('/no_think', '') | replace('<s>', '[s]') }}\n"
    "{% endfor %}"
)
FIRST_PART_ONLY = "{% for m in messages %}{{ m['content'][0]['text'] }}\n{% endfor %}"
NO_THOUGHTS = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}\n{% endfor %}"


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def user(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def chat(own: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = own
    return chat_text(messages, tokenizer, **options)


@pytest.mark.parametrize(
    ("template", "messages", "prompt"),
    [
        (STRINGS, user("hello world"), "user: hello world\n"),
        (STRINGS, user(parts("hello world")), "user: hello world\n"),
        (STRINGS, user(parts("hello", "world")), "user: hello world\n"),
        (PARTS, user("hello world"), "user: hello world\n"),
        (PARTS, user(parts("hello", "world")), "user: hello world\n"),
        (PARTS, [system("be brief"), *user(parts("a", "b"), "c")], "system: be brief\nuser: a b\nuser: c\n"),
        (BOTH, user("hello", parts("big", "world")), "hello\n<big><world>\n"),
        (MACRO, user("hello", parts("big", "world")), "hello\nbig;world;\n"),
        (MACRO_OF_PARTS, user("hello", parts("big ", "world")), "hello\nbig world\n"),
        (FIRST_PART, user(parts("hello")), "hello\n"),
        (FIRST_PART, user(parts("hello", "world")), "hello world\n"),
        (SYSTEM_STRING_USER_PARTS, [system("be brief"), *user("hello world")], "be brief\nhello world"),
        (SYSTEM_STRING_USER_PARTS, [system(parts("be brief")), *user(parts("hello"))], "be brief\nhello"),
        (CHATML, user(parts("hello world")), "<|im_start|>user\nhello world<|im_end|>"),
        (STRINGS, user([]), "user: \n"),
        (PARTS, user([]), "user:\n"),
        (STRINGS, user("", "  "), "user: \nuser:   \n"),
        ("{% for m in messages %}{{ m.content | trim }}|{% endfor %}", user("  some \n room "), "some \n room|"),
        ("{% for m in messages %}{{ m.content | tojson }}{% endfor %}", user('a "b"\nc'), '"a \\"b\\"\\nc"'),
        ("{% for m in messages %}{{ m.content | e | upper }}{% endfor %}", user("1 < two"), "1 &LT; TWO"),
        (NO_THOUGHTS, [*user("one"), {"role": "assistant", "content": "<think>hm\n</think>\n\nyes"}], "one\n\n\nyes\n"),
        (NO_THOUGHTS, [*user("one"), {"role": "assistant", "content": "<think>hm</think>"}], "one\n\n"),
        (FIRST_PART_ONLY, [system("be brief"), *user(parts("look", "here"))], "be brief\nlook here\n"),
        ("{% for m in messages %}{{ m.content | e }}{% endfor %}", user("<p>it's \"5\" & 6</p>"),
         "&lt;p&gt;it&#39;s &#34;5&#34; &amp; 6&lt;/p&gt;"),
        (CONTROL_WORDS, [system("/no_think"), *user("say <s> /no_think")], "\nsay [s] \n"),
        (CONTROL_WORDS, user(parts("one /think", "two")), "one  two\n"),
        ("{{ bos_token }}{{ eos_token }}" + STRINGS, user("x"), "<|endoftext|>user: x\n"),
    ],
)  # fmt: skip
def test_words_reach_the_prompt_in_the_form_that_the_template_reads(template, messages, prompt) -> None:
    assert chat(template, messages) == prompt


@pytest.mark.parametrize("template", [STRINGS, PARTS, BOTH, MACRO, CHATML])
@pytest.mark.parametrize("content", ["hello world", parts("hello", "world")], ids=["string", "parts"])
def test_where_transformers_renders_the_words_the_prompt_is_what_it_renders(template, content) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    try:
        expected = tokenizer.apply_chat_template(user(content), tokenize=False, add_generation_prompt=True)
    except TypeError:
        expected = ""
    if "'text'" not in expected and "hello" in expected:
        assert chat_text(user(content), tokenizer) == expected
    else:
        assert "hello" in chat_text(user(content), tokenizer)


@pytest.mark.parametrize(
    ("taken", "said", "kept"),
    [
        ("split('</thought>')[-1]", "<thought>hm</thought>yes", "yes"),
        ("split('[/THINK]')[-1]", "[THINK]hm[/THINK]yes", "yes"),
        ("split('◁/think▷')[-1]", "◁think▷hm◁/think▷yes", "yes"),
        ("split('</seed:think>')[-1]", "<seed:think>hm</seed:think>yes", "yes"),
        ("split('<answer>')[-1].split('</answer>')[0].strip()", "<think>hm</think>\n<answer>\nyes\n</answer>", "yes"),
        ("split('<|START_RESPONSE|>')[-1].removesuffix('<|END_RESPONSE|>')",
         "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>yes<|END_RESPONSE|>", "yes"),
    ],
)  # fmt: skip
def test_a_template_may_take_out_what_the_assistant_thought(taken: str, said: str, kept: str) -> None:
    template = "{% for m in messages %}{{ m.content." + taken + " if m.content is string else m.content[0].text }}|"
    messages = [*user("one"), {"role": "assistant", "content": said}, *user("two")]
    assert chat(template + "{% endfor %}", messages) == f"one|{kept}|two|"


@pytest.mark.parametrize(
    ("template", "messages", "left_out"),
    [
        ("hello!", user("something"), "messages[0] (user)"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", [system("be brief"), *user("x")],
         "messages[0] (system)"),
        ("{{ messages[-1].content }}", user("first things", "last things"), "messages[0] (user)"),
        ("{% for m in messages %}{{ m.content[:4] }}{% endfor %}", user("a long story"), "messages[0] (user)"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
         [*user("one"), {"role": "assistant", "content": "of few words"}, *user("two")], "messages[1] (assistant)"),
        (NO_THOUGHTS, user("what does </think> mean"), "messages[0] (user)"),
    ],
)  # fmt: skip
def test_a_template_that_leaves_out_what_somebody_said_is_refused(template, messages, left_out) -> None:
    with pytest.raises(InputError, match="leaves out") as refused:
        chat(template, messages)
    assert left_out in refused.value.actual


FAULTS = {
    "divides by zero": ("\n{{ 1 // 0 }}" + STRINGS, 2, "ZeroDivisionError"),
    "includes": ("{% include 'x.jinja' %}" + STRINGS, 1, "includes another template"),
    "imports": ("\n\n{% import 'x.jinja' as x %}" + STRINGS, 3, "includes another template"),
    "extends": ("{% extends 'x.jinja' %}" + STRINGS, 1, "includes another template"),
    "raises": ("\n{{ raise_exception('System role not supported') }}", 2, "System role not supported"),
    "undefined": ("\n\n{{ a.b.c }}", 3, "'a' is undefined"),
    "no such filter": ("\n{{ 1 | nofilter }}", 2, "nofilter"),
    "no such test": ("\n{{ 1 is notest }}", 2, "notest"),
    "syntax": ("\n{% for %}", 2, "Expected an expression"),
    "not closed": ("{% for m in messages %}\n{{ m.content }}", 2, "end of template"),
    "in a macro": ("{% macro f(x) %}\n{{ x // 0 }}{% endmacro %}\n\n{{ f(1) }}", 2, "ZeroDivisionError"),
    "recursion": ("{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}", 2, "RecursionError"),
    "deep": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", None, "RecursionError"),
    "break outside": ("{% break %}", None, "SyntaxError"),
    "changes messages": ("{{ messages.append(1) }}", 1, "unsafe"),
    "out of the sandbox": ("{{ ''.__class__.mro() }}", 1, "unsafe"),
    "wide range": ("{% for i in range(10 ** 9) %}{% endfor %}", 1, "Range too big"),
    "much memory": ("{% set x = namespace(s='ab') %}\n{% for i in range(60) %}{% set x.s = x.s * 2 %}{% endfor %}", 2,
                    "more than 400,000,000 bytes"),
    "constant of much memory": ("{{ 'a' * 10 ** 10 }}", 1, "more than 400,000,000 bytes"),
    "wide format": ("{{ '%9999999999d' % 1 }}", 1, "more than 400,000,000 bytes"),
    "long prompt": ("{{ 'a' * 30000000 }}" + STRINGS, None, "30,000,009 characters"),
    "no text": (7, None, "TypeError"),
}  # fmt: skip
ENDLESS = {
    "in loops": ("\n{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", 2),
    "inside a call": ("{{ 9 ** (9 ** 9) }}", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_template_that_fails_is_refused_by_name_and_line(fault) -> None:
    template, line, said = FAULTS[fault]
    with pytest.raises(InputError) as refused:
        chat(template, user("hi"))
    assert said in refused.value.actual and "chat template in tokenizer_config.json" in refused.value.actual
    assert line is None or f", line {line}: " in refused.value.actual


def test_a_template_that_never_ends_is_ended_and_others_do_not_wait_for_it() -> None:
    chat(STRINGS, user("the processes are there"))
    start = time.monotonic()
    with ThreadPoolExecutor(len(ENDLESS)) as callers:
        waiting = [callers.submit(chat, template, user("hi")) for template, _ in ENDLESS.values()]
        for number in range(5):
            assert chat(STRINGS, user(f"number {number}")) == f"user: number {number}\n"
        assert not any(w.done() for w in waiting), "others were served meanwhile"
        for wait, (_, line) in zip(waiting, ENDLESS.values(), strict=True):
            refused = wait.exception()
            assert isinstance(refused, InputError) and "did not end in 1 s" in refused.actual
            assert line is None or f", line {line}: " in refused.actual
    assert time.monotonic() - start < 30


def test_processes_that_were_killed_are_started_anew() -> None:
    chat(STRINGS, user("one"))
    os.kill(template_processes()._first.pid, signal.SIGKILL)
    template_processes()._first.wait()
    template_processes()._idle.clear()
    assert chat(STRINGS, user("two")) == "user: two\n"


def test_of_several_templates_the_default_is_taken_as_transformers_takes_it() -> None:
    several = {"default": STRINGS, "tool_use": PARTS}
    assert chat(several, user("hi")) == "user: hi\n"
    assert chat(several, user("hi"), template="tool_use") == "user: hi\n"
    with pytest.raises(InputError, match=r"none is named `default`: chat, tool_use"):
        chat({"tool_use": STRINGS, "chat": STRINGS}, user("hi"))
    assert chat({"chat": STRINGS}, user("hi"), template="chat") == "user: hi\n"
    with pytest.raises(InputError, match=r"tokenizer_config.json \(default\), line 1: "):
        chat({"default": "{{ 1 // 0 }}"}, user("hi"))


def test_a_template_of_the_request_is_named_and_variables_reach_it() -> None:
    assert chat(None, user("hi"), template=STRINGS) == "user: hi\n"
    with pytest.raises(InputError, match=r"the request's chat_template, line 2: ZeroDivisionError"):
        chat(STRINGS, user("hi"), template="\n{{ 1 // 0 }}")
    assert chat("{{ thinking }}" + STRINGS, user("hi"), variables={"thinking": False}) == "Falseuser: hi\n"
    for name in ("messages", "chat_template", "add_generation_prompt", "tools", "self", "tokenize"):
        with pytest.raises(InputError, match=f"variables of the template, got {name}"):
            chat(STRINGS, user("hi"), variables={name: 1})
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InputError, match="nested too deep"):
        chat(STRINGS, user("hi"), variables={"deep": deep})
    with pytest.raises(InputError, match="/v1/completions"):
        chat(None, user("hi"))


def test_the_last_message_is_left_open_as_transformers_leaves_it() -> None:
    messages = [*user("hi"), {"role": "assistant", "content": "hello wor"}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert chat(CHATML, messages, **options).endswith("<|im_start|>assistant\nhello wor")
    with pytest.raises(InputError, match="both"):
        chat(CHATML, messages, continue_final_message=True)
    with pytest.raises(InputError, match="leaves out"):
        chat("{% for m in messages %}{{ m.content[:2] }}{% endfor %}", messages, **options)


def test_the_file_of_a_template_is_named(tmp_path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.name_or_path = str(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("x")
    tokenizer.chat_template = "{{ 1 // 0 }}"
    with pytest.raises(InputError, match=r"refused by chat_template.jinja, line 1"):
        chat_text(user("hi"), tokenizer)
