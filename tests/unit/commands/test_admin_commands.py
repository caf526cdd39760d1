"""The request bodies that the admin commands build from their options, and their output."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from typing import Any

import click
import pytest

from gateway.commands.options import load_body
from gateway.commands.terminal import clean, echo_json, members

MODEL = "qwen2-1.5b-instruct"


def test_a_model_alone_is_the_whole_body() -> None:
    assert load_body(MODEL) == {"modelKey": MODEL}


def test_every_option_has_a_field_in_the_body() -> None:
    body = load_body(
        MODEL,
        instance="one",
        context_length=8192,
        gpu="max",
        cpu_threads=4,
        ttl=0,
        fields=("flashAttention=true", "gpu.mainGpu=0"),
        no_activate=True,
        temperature=0.5,
        max_tokens=100,
        defaults=("topP=0.9", 'stopStrings=["a", "b"]'),
    )
    assert body == {
        "modelKey": MODEL,
        "instanceId": "one",
        "ttlSeconds": 0,
        "activate": False,
        "loadConfig": {
            "contextLength": 8192,
            "cpuThreads": 4,
            "flashAttention": True,
            "gpu": {"ratio": "max", "mainGpu": 0},
        },
        "defaultInference": {
            "temperature": 0.5,
            "maxTokens": 100,
            "topP": 0.9,
            "stopStrings": ["a", "b"],
        },
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("1.5", 1.5),
        ("-1", -1),
        ("true", True),
        ("false", False),
        ("null", None),
        ("q8_0", "q8_0"),
        ('"1"', "1"),
        ("", ""),
        ("a=b", "a=b"),
        ("[0, 1]", [0, 1]),
        ('{"a": 1}', {"a": 1}),
        ("NaN", "NaN"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_a_value_is_json_or_else_a_string(text: str, value: Any) -> None:
    found = load_body(MODEL, fields=(f"seed={text}",))["loadConfig"]["seed"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(("text", "value"), [("max", "max"), ("off", "off"), ("0.5", 0.5)])
def test_gpu_is_a_word_or_a_ratio(text: str, value: Any) -> None:
    assert load_body(MODEL, gpu=text)["loadConfig"] == {"gpu": {"ratio": value}}


def test_an_object_and_its_members_are_merged() -> None:
    fields = ('gpu={"ratio": 0.5}', "gpu.mainGpu=1")
    assert load_body(MODEL, fields=fields)["loadConfig"] == {"gpu": {"ratio": 0.5, "mainGpu": 1}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fields": ("seed",)}, "--set seed: must be FIELD=VALUE"),
        ({"fields": ("=1",)}, "must be FIELD=VALUE"),
        ({"fields": ("gpu.=1",)}, "must be FIELD=VALUE"),
        ({"defaults": ("topP",)}, "--default topP: must be FIELD=VALUE"),
        ({"fields": ("seed=1", "seed=2")}, "seed: given twice"),
        ({"context_length": 1, "fields": ("contextLength=2",)}, "contextLength: given twice"),
        ({"gpu": "max", "fields": ("gpu.ratio=1",)}, "gpu.ratio: given twice"),
        ({"gpu": "max", "fields": ('gpu={"ratio": 1}',)}, "gpu: given twice"),
        ({"fields": ("gpu=max", "gpu.mainGpu=0")}, "gpu already has a value of its own"),
        ({"temperature": 1.0, "defaults": ("temperature=1",)}, "temperature: given twice"),
    ],
)
def test_a_malformed_or_repeated_field_is_wrong_usage(options: dict[str, Any], words: str) -> None:
    with pytest.raises(click.UsageError, match=words) as caught:
        load_body(MODEL, **options)
    assert caught.value.exit_code == 2


def test_control_characters_are_escaped() -> None:
    assert clean("\x1b[31mred\x07\x9b\u202e\ud800\n") == r"\x1b[31mred\x07\x9b\u202e\ud800\n"
    assert clean("Größe 模型 [x] :smile:") == "Größe 模型 [x] :smile:"


def test_members_are_shown_with_their_paths() -> None:
    content = {"a": 1, "b": None, "c": {"d": "x", "e": {"f": True}}, "g": "two words", "h": "\x1b"}
    assert members(content) == 'a=1 c.d=x c.e.f=true g="two words" h=\\x1b'


def test_importing_the_commands_imports_no_heavy_package() -> None:
    script = "import sys, gateway.commands; print({'requests', 'rich', 'flask'} & set(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == "set()\n"


HOSTILE = "a\x9b31m\u202e\u2066\x7f\u061c\x1b[0m\U000e0001 ü模 [x]"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("as_bytes", [True, False])
def test_json_on_a_terminal_has_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, as_bytes: bool
) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    raw = json.dumps({HOSTILE: [HOSTILE]}, ensure_ascii=False)
    echo_json(raw.encode() if as_bytes else raw)
    printed = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert printed.removesuffix("\n").isprintable()
    assert "ü模 [x]" in printed
    assert json.loads(printed) == {HOSTILE: [HOSTILE]}


def test_json_that_is_not_printed_on_a_terminal_is_unchanged(
    capsysbinary: pytest.CaptureFixture[bytes],
) -> None:
    raw = json.dumps({"a": HOSTILE}, ensure_ascii=False).encode()
    echo_json(raw)
    assert capsysbinary.readouterr().out == raw + b"\n"
