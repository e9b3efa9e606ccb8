"""Chat templates: what they may do, what they may not, and what users are told."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from engine.chat_template import ChatTemplate
from engine.errors import InvalidArgument, ModelFileError

USER = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: Any = USER, **options: Any) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "model").render(messages, **options)


def test_renders_roles_special_tokens_and_generation_prompt() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [{"role": "system", "content": " be brief "}, *USER]
    assert render(source, messages) == "<s>[system]be brief</s>[user]Hi</s>[assistant]"
    assert render(source, messages, add_generation_prompt=False) == "<s>[system]be brief</s>[user]Hi</s>"


def test_blocks_leave_no_blank_lines() -> None:
    assert render("{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}\n") == "Hi\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ {'a<b': 'é'} | tojson }}", '{"a<b": "é"}'),
        ("{{ messages | tojson(indent=1) }}", '[\n {\n  "role": "user",\n  "content": "Hi"\n }\n]'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{% set ns = namespace(n=0) %}{% for i in range(3) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "3"),
        ("{{ dict(a=1)['a'] }}{% if tools %}tools{% endif %}", "1"),
        ("{{ strftime_now('%d %b %Y') }}", "01 Jan 2025"),
    ],
)
def test_what_templates_may_use(source: str, text: str) -> None:
    assert render(source) == text


def test_the_date_is_an_argument() -> None:
    assert render("{{ strftime_now('%Y-%m-%d') }}", now=datetime(2031, 5, 6)) == "2031-05-06"


def test_exception_of_a_template_reaches_the_user() -> None:
    with pytest.raises(InvalidArgument, match=r"^messages: got \['user'\].*roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__init__.__globals__ }}",
        "{% set ns = namespace() %}{% set ns.__html__ = 1 %}",
        "{{ namespace(**{'_x': 1}) }}",
        "{{ dict.fromkeys([1]) }}",
        "{% for i in range(1000000) %}{% endfor %}",
        "{{ 1 + messages[0].content }}",
        "{{ messages[7].content.upper() }}",
        "{{ 1 // 0 }}",
    ],
)
def test_what_templates_may_not_do_is_an_error_and_no_more(source: str) -> None:
    with pytest.raises(InvalidArgument, match="messages"):
        render(source)


def test_template_that_cannot_be_parsed_names_the_file() -> None:
    with pytest.raises(ModelFileError, match=r"^model: its chat template is not valid Jinja"):
        render("{% for %}")


@pytest.mark.parametrize(
    ("messages", "field"),
    [
        ([], "messages"),
        ("Hi", "messages"),
        (None, "messages"),
        (["Hi"], r"messages\[0\]"),
        ([*USER, {"role": "user"}], r"messages\[1\]\.content"),
        ([{"role": "user", "content": None}], r"messages\[0\]\.content"),
        ([{"content": "Hi"}], r"messages\[0\]\.role"),
        ([{"role": "", "content": "Hi"}], r"messages\[0\]\.role"),
    ],
)
def test_malformed_messages_name_the_field(messages: Any, field: str) -> None:
    with pytest.raises(InvalidArgument, match=f"^{field}: got"):
        render("x", messages)
