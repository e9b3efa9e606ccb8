"""Prompts from files: what is taken, and that a mistake is found before anything is sent."""

from __future__ import annotations

import pytest

from cluster.prompt_file import PromptLine, from_text, read_prompt_file
from engine.errors import ConfigError, InvalidArgument


def read(tmp_path, content: str | bytes) -> list[PromptLine]:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompt_file(path)


def test_three_kinds_of_prompt(tmp_path):
    lines = read(
        tmp_path,
        '{"id": "a", "prompt": "x", "max_tokens": 3}\n\n'
        '{"messages": [{"role": "user", "content": ""}], "source": "somewhere"}\r\n'
        '{"id": 7, "token_ids": [1, 2]}',
    )
    assert [(line.id, line.prompt, line.max_tokens) for line in lines] == [
        ("a", "x", 3),
        ("3", (("user", ""),), None),
        (7, (1, 2), None),
    ]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "is not JSON"),
        ("[1]", "expected a JSON object"),
        ('{"id": "a"}', "expected exactly one of prompt, messages, token_ids"),
        ('{"prompt": "a", "token_ids": [1]}', "expected exactly one of"),
        ('{"prompt": ""}', "prompt: got '', expected a string of at least one character"),
        ('{"prompt": 3}', "prompt: got 3, expected"),
        ('{"prompt": "\\ud800"}', "prompt: got '\\ud800', expected valid UTF-8"),
        ('{"promt": "a"}', "did you mean 'prompt'?"),
        ('{"prompt": "a", "max_token": 3}', "did you mean 'max_tokens'?"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens: got 0, expected an integer in [1, "),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens: got 1.5"),
        ('{"prompt": "a", "max_tokens": true}', "max_tokens: got True"),
        ('{"prompt": "a", "id": null}', "id: got None, expected a string or an integer"),
        ('{"token_ids": []}', "token_ids: got [], expected a list of at least one"),
        ('{"token_ids": [1, -2]}', "token_ids[1]: got -2"),
        ('{"token_ids": [1, 4294967296]}', "token_ids[1]: got 4294967296"),
        ('{"messages": []}', "messages: got []"),
        ('{"messages": ["hi"]}', "messages[0]: got 'hi', expected an object"),
        ('{"messages": [{"role": "user"}]}', "messages[0].content: got None, expected a string"),
        ('{"messages": [{"role": "", "content": "x"}]}', "messages[0].role: got ''"),
    ],
)
def test_mistakes_name_line_and_field(tmp_path, line, expected):
    with pytest.raises((ConfigError, InvalidArgument)) as caught:
        read(tmp_path, '{"prompt": "fine"}\n' + line)
    assert f"{tmp_path / 'p.jsonl'}:2: " in str(caught.value)
    assert expected in str(caught.value)


def test_not_utf8(tmp_path):
    with pytest.raises(ConfigError, match=r"p.jsonl:1: is not UTF-8: .* at byte 12"):
        read(tmp_path, b'{"prompt": "\xff"}')


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_files(tmp_path, content):
    with pytest.raises(ConfigError, match="is empty"):
        read(tmp_path, content)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_prompt_file(tmp_path / "none")


def test_text():
    assert from_text("hello").prompt == "hello"
    assert from_text("hello", is_chat=True).prompt == (("user", "hello"),)
    with pytest.raises(InvalidArgument, match="TEXT: got ''"):
        from_text("")
    # What Python makes of an argument that is not UTF-8.
    with pytest.raises(InvalidArgument, match=r"TEXT: .* valid UTF-8"):
        from_text(b"\xff".decode("utf-8", "surrogateescape"))
