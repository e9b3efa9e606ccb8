"""Bad requests: each gets an error that names the field, the value and what would be right."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest

from cluster.intake import prompt_token_ids
from cluster.messages import GenerateRequest, Message, ModelInfo
from engine.chat_template import ChatTemplate
from engine.errors import InvalidArgument, NotFound
from engine.gguf_tokenizer import build as build_backend
from engine.sampling import SamplingParams
from engine.structure import Structure
from engine.tokenizer import Tokenizer
from tests.cluster.fake_decode import FakeDecode
from tests.cluster.serving import ANSWER, CONFIG, TO_THE_END, collect, serving
from tests.engine.tiny_tokenizers import build, byte_level_metadata

PLAIN = build(byte_level_metadata())
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
BACKEND, _ = build_backend(byte_level_metadata(), "tiny.gguf")
CHATTY = Tokenizer(BACKEND, frozenset({0}), chat_template=ChatTemplate(TEMPLATE, {}, "tiny.gguf"))
MODEL = ModelInfo("tiny", vocab_size=PLAIN.vocab_size, max_context=64)
REQUEST = GenerateRequest("r", "abc", SamplingParams(max_tokens=10))
CHAT = (Message("user", "ab"), Message("assistant", "c"))


def ids(request: GenerateRequest, tokenizer: Tokenizer | None = CHATTY) -> tuple[int, ...]:
    return prompt_token_ids(request, MODEL, tokenizer, max_prompt_chars=100)


def test_each_kind_of_prompt_becomes_token_ids() -> None:
    assert ids(REQUEST) == tuple(PLAIN.encode("abc"))
    assert ids(replace(REQUEST, prompt=CHAT)) == tuple(PLAIN.encode("u:ab;a:c;", add_special_tokens=False))
    assert ids(replace(REQUEST, prompt=(0, 5, 9)), tokenizer=None) == (0, 5, 9)
    assert ids(replace(REQUEST, model="tiny")) == ids(REQUEST)


@pytest.mark.parametrize("chars", [1, 100, 101])
async def test_structures_are_checked_in_a_thread_however_long_the_prompt(
    chars: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr("engine.guidance.check_structure", lambda _: threads.append(threading.current_thread()))
    request = replace(TO_THE_END, prompt="h" * chars)
    request = replace(request, params=replace(request.params, structure=Structure("regex", "[ab]+")))
    async with serving(FakeDecode(ANSWER), config=CONFIG.model_copy(update={"max_prompt_chars": 100})) as gateway:
        with nullcontext() if chars <= 100 else pytest.raises(InvalidArgument, match="101 characters"):
            await collect(gateway, request)
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_prompt_and_answer_may_fill_the_context_exactly() -> None:
    assert len(ids(replace(REQUEST, prompt=(1,) * 54))) == 54


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"prompt": ""}, "text: got '', expected a prompt of at least one token"),
        ({"prompt": ()}, "token_ids: got (), expected a prompt of at least one token"),
        ({"prompt": "a" * 101}, "text: got '101 characters', expected at most 100"),
        ({"prompt": (Message("user", "a" * 99),)}, "messages: got '103 characters', expected at most 100"),
        ({"prompt": "a\ud800"}, "text: got '\\ud800', expected valid Unicode; character 1 is a lone surrogate"),
        ({"prompt": (1, 265)}, "token_ids: got 265, expected a token id in [0, 265)"),
        ({"prompt": (1, -1)}, "token_ids: got -1, expected a token id in [0, 265)"),
        ({"prompt": (1,) * 64}, "token_ids: got '64 tokens', expected at most 63: the model's context is 64"),
        (
            {"prompt": (1,) * 55},
            "sampling_params.max_tokens: got 10, expected at most 9: the prompt has 55 of 64 tokens",
        ),
        ({"params": SamplingParams(temperature=float("nan"))}, "sampling_params.temperature: got nan"),
        ({"params": SamplingParams(stop_token_ids=(265,))}, "sampling_params.stop_token_ids: got 265"),
        ({"deadline_s": 0.0}, "deadline_s: got 0.0, expected a positive number of seconds"),
        ({"deadline_s": float("nan")}, "deadline_s: got nan, expected a positive number of seconds"),
        ({"request_id": "x" * 257}, "expected at most 256 characters"),
        ({"salt": b"x" * 257}, "cache_salt: got '257 bytes', expected at most 256 bytes"),
    ],
)
def test_bad_values_are_named(change: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        ids(replace(REQUEST, **change))
    assert text in str(caught.value)


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(NotFound, match="model 'gpt' not found; known: tiny"):
        ids(replace(REQUEST, model="gpt"))


def test_a_chat_needs_a_template() -> None:
    with pytest.raises(InvalidArgument, match="messages: got 2, expected a plain prompt"):
        ids(replace(REQUEST, prompt=CHAT), tokenizer=PLAIN)


@pytest.mark.parametrize(
    "change", [{"prompt": "abc"}, {"prompt": CHAT}, {"prompt": (1,), "params": SamplingParams(stop=("x",))}]
)
def test_without_a_tokenizer_there_is_no_text(change: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match="this gateway has no tokenizer"):
        ids(replace(REQUEST, **change), tokenizer=None)
