"""Tokenizers from GGUF metadata and from Hugging Face folders."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from engine import gguf_tokenizer
from engine.errors import InvalidArgument, ModelFileError
from engine.gguf_file import GGUFFile
from engine.model_source import ModelFiles
from engine.tokenizer import Tokenizer, load
from tests.engine.tiny_tokenizers import build, byte_level_metadata, sentencepiece_metadata
from tests.golden.default_model import require_default_model

TOKEN_IDS = Path(__file__).parents[1] / "data" / "smollm2_token_ids.json"
PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "prompts"


# ── the default model ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return load(require_default_model())


@pytest.mark.model
def test_default_model_gives_the_ids_that_transformers_gave(smollm2: Tokenizer) -> None:
    for entry in json.loads(TOKEN_IDS.read_text(encoding="utf-8")):
        if "text" in entry:
            assert smollm2.encode(entry["text"]) == entry["token_ids"], entry["text"]
            assert smollm2.decode(entry["token_ids"], skip_special_tokens=False) == entry["text"]
        else:
            assert smollm2.encode_chat(entry["messages"]) == entry["token_ids"], entry["messages"]


@pytest.mark.model
def test_default_model_knows_its_special_tokens(smollm2: Tokenizer) -> None:
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_ids) == (49152, 1, {2})
    assert smollm2.has_chat_template
    assert smollm2.special_token_ids == set(range(17))


@pytest.mark.model
def test_default_model_loads_quickly() -> None:
    files = require_default_model()
    started = time.perf_counter()
    load(files)
    assert time.perf_counter() - started < 2.0, "0.2 s when nothing else runs"


@pytest.mark.model
@pytest.mark.nightly
@pytest.mark.filterwarnings("default")
def test_default_model_agrees_with_transformers_on_all_shared_prompts(smollm2: Tokenizer) -> None:
    if not PROMPTS.is_dir():
        pytest.skip(f"no prompts at {PROMPTS}")
    transformers = pytest.importorskip("transformers")
    path = require_default_model().path
    oracle = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for file in sorted(PROMPTS.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
            text = messages[-1]["content"]
            assert smollm2.encode(text) == oracle.encode(text), record["id"]
            chat = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            assert smollm2.encode_chat(messages) == chat, record["id"]
    sonnet = (PROMPTS / "sonnet.txt").read_text(encoding="utf-8")
    assert smollm2.encode(sonnet) == oracle.encode(sonnet)


# ── vocabularies inside GGUF files ───────────────────────────────────────────────────────────────────────────────────


@given(st.text())
def test_byte_level_gives_any_text_back(text: str) -> None:
    tokenizer = build(byte_level_metadata())
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(st.text(st.characters(exclude_characters="▁", exclude_categories=("Cs",))))
def test_sentencepiece_gives_any_text_back(text: str) -> None:
    tokenizer = build(sentencepiece_metadata())
    assert tokenizer.decode(tokenizer.encode("x" + text)) == "x" + text


def test_byte_level_merges_and_added_tokens() -> None:
    tokenizer = build(byte_level_metadata())
    spelled = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("hel the<think><|end|>")]
    assert spelled == ["hel", "Ġthe", "<think>", "<|end|>"]


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = build(sentencepiece_metadata())
    spelled = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("the hello 你ö")]
    assert spelled == ["<s>", "▁the", "▁he", "l", "lo", "▁", "你", "<0xC3>", "<0xB6>"]
    plain = tokenizer.encode("the", add_special_tokens=False)
    assert [tokenizer.token_text(token_id) for token_id in plain] == ["▁the"]


def test_first_space_of_a_text_serves_as_the_space_prefix() -> None:
    tokenizer = build(sentencepiece_metadata())
    assert tokenizer.encode(" the") == tokenizer.encode("the"), "as in transformers"


def test_space_prefix_can_be_switched_off() -> None:
    tokenizer = build({**sentencepiece_metadata(), "tokenizer.ggml.add_space_prefix": False})
    spelled = [tokenizer.token_text(token_id) for token_id in tokenizer.encode("the the")]
    assert spelled == ["<s>", "t", "he", "▁the"]
    assert tokenizer.decode(tokenizer.encode(" the")) == " the"


@pytest.mark.parametrize(
    ("base", "flags", "first", "last"),
    [
        (byte_level_metadata, {}, [], []),
        (byte_level_metadata, {"pre": "llama-bpe"}, [1], []),
        (byte_level_metadata, {"pre": "llama-bpe", "add_bos_token": False}, [], []),
        (byte_level_metadata, {"add_bos_token": True, "add_eos_token": True}, [1], [0]),
        (sentencepiece_metadata, {}, [1], []),
        (sentencepiece_metadata, {"add_bos_token": False, "add_eos_token": True}, [], [2]),
    ],
)
def test_bos_and_eos_flags(
    base: Callable[[], dict[str, Any]], flags: dict[str, Any], first: list[int], last: list[int]
) -> None:
    tokenizer = build(base() | {f"tokenizer.ggml.{key}": value for key, value in flags.items()})
    inner = tokenizer.encode("the", add_special_tokens=False)
    assert tokenizer.encode("the") == [*first, *inner, *last]


def test_all_end_tokens_of_a_file_count() -> None:
    tokenizer = build({**byte_level_metadata(), "tokenizer.ggml.eot_token_id": 2})
    assert tokenizer.eos_token_ids == {0, 2}


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "it's 123", [["i", "t"], ["'", "s"], ["Ġ", "1", "2", "3"]]),
        ("qwen2", "IT'S 123", [["I", "T"], ["'", "S"], ["Ġ"], ["1"], ["2"], ["3"]]),
        ("llama-bpe", "x 12345", [["x"], ["Ġ"], ["1", "2", "3"], ["4", "5"]]),
        ("tekken", "fooBar12", [["f", "o", "o"], ["B", "a", "r"], ["1"], ["2"]]),
    ],
)
def test_each_vocabulary_splits_its_own_way(pre: str, text: str, pieces: list[list[str]]) -> None:
    backend, _ = gguf_tokenizer.build({**byte_level_metadata(), "tokenizer.ggml.pre": pre}, "tiny.gguf")
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == ["".join(p) for p in pieces]


@pytest.mark.parametrize(
    ("base", "change", "problem"),
    [
        (byte_level_metadata, {"model": "bert"}, "tokenizer.ggml.model = 'bert' is not supported; known: gpt2, llama"),
        (byte_level_metadata, {"model": None}, "tokenizer.ggml.model is missing"),
        (byte_level_metadata, {"pre": "klingon"}, "tokenizer.ggml.pre = 'klingon' is not supported; known: default, "),
        (byte_level_metadata, {"tokens": None}, "tokenizer.ggml.tokens is missing"),
        (byte_level_metadata, {"merges": None}, "tokenizer.ggml.merges is missing"),
        (byte_level_metadata, {"merges": ["q z"]}, "merge 'q z' is not made of tokens"),
        (byte_level_metadata, {"token_type": [1]}, "token_type is not a list of 265 numbers"),
        (byte_level_metadata, {"eos_token_id": 999}, "eos_token_id = 999, but the vocabulary has 265 tokens"),
        (byte_level_metadata, {"add_bos_token": 1}, "add_bos_token = 1, expected true or false"),
        (sentencepiece_metadata, {"scores": None}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_bad_metadata_names_the_key(base: Callable[[], dict[str, Any]], change: dict[str, Any], problem: str) -> None:
    with pytest.raises(ModelFileError, match=f"tiny.gguf: .*{problem}"):
        build(base() | {f"tokenizer.ggml.{key}": value for key, value in change.items()})


@pytest.mark.model
def test_truncated_file_is_a_clear_error(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    with require_default_model().path.open("rb") as whole:
        path.write_bytes(whole.read(100_000))
    with pytest.raises(ModelFileError, match="truncated"):
        load(ModelFiles("gguf", path))


# ── Hugging Face folders ─────────────────────────────────────────────────────────────────────────────────────────────


def write_folder(folder: Path, **files: Any) -> ModelFiles:
    """A folder with a tiny tokenizer.json, and `name`.json for each of `files`."""
    backend, _ = gguf_tokenizer.build(byte_level_metadata(), "tiny")
    backend.enable_truncation(2)
    backend.save(str(folder / "tokenizer.json"))
    for name, value in {"config": {"vocab_size": 300}, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return ModelFiles("hf", folder)


def test_folder_gives_ids_text_and_special_tokens(tmp_path: Path) -> None:
    config = {"bos_token": "<|start|>", "eos_token": {"content": "<|end|>"}, "add_bos_token": True}
    tokenizer = load(write_folder(tmp_path, tokenizer_config=config, generation_config={"eos_token_id": [2, 0]}))
    assert tokenizer.encode("hel the")[:1] == [1]
    assert tokenizer.decode(tokenizer.encode("a longer text, not cut")) == "a longer text, not cut"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids, tokenizer.vocab_size) == (1, {0, 2}, 300)
    assert tokenizer.decode([299]) == "", "a logit without a token has no text"
    assert not tokenizer.has_chat_template


def test_folder_without_extras(tmp_path: Path) -> None:
    tokenizer = load(write_folder(tmp_path, config={"vocab_size": 265, "eos_token_id": 2}))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (None, {2})
    with pytest.raises(InvalidArgument, match="no chat template"):
        tokenizer.encode_chat([{"role": "user", "content": "Hi"}])


TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [TEMPLATE, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": TEMPLATE}], None],
)
def test_folder_template_wherever_it_is(tmp_path: Path, template: object) -> None:
    files = write_folder(
        tmp_path, tokenizer_config={"bos_token": "<|start|>", "add_bos_token": True, "chat_template": template}
    )
    if template is None:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    tokenizer = load(files)
    # One start token: the template writes it, so encoding does not add another.
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]) == [1, *tokenizer.encode("a")[1:]]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer", "{", "tokenizer.json: not valid JSON"),
        ("tokenizer", "{}", "tokenizer.json: not a tokenizer"),
        ("tokenizer_config", "[]", "tokenizer_config.json: expected a JSON object"),
        ("tokenizer_config", '{"chat_template": 3}', "chat template is int, expected a string"),
        ("tokenizer_config", '{"chat_template": "{% if %}"}', "not valid Jinja"),
        ("generation_config", '{"eos_token_id": "x"}', "eos_token_id = 'x', expected a token id"),
    ],
)
def test_broken_folder_names_the_file(tmp_path: Path, name: str, content: str, problem: str) -> None:
    files = write_folder(tmp_path)
    (tmp_path / f"{name}.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelFileError, match=problem):
        load(files)


def test_decoder_that_cannot_be_streamed_is_refused() -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0}))
    backend.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(ModelFileError, match="decoder WordPiece is not supported; known: ByteLevel"):
        Tokenizer(backend, frozenset())


# ── long texts ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["text", "chat", "token ids"])
def test_other_threads_run_while_a_long_text_is_worked_on(kind: str) -> None:
    tokenizer = build(byte_level_metadata(), TEMPLATE)
    text = "the hello " * 50_000
    works: dict[str, Callable[[], object]] = {
        "text": partial(tokenizer.encode, text),
        "chat": partial(tokenizer.encode_chat, [{"role": "user", "content": text}]),
        "token ids": partial(tokenizer.decode, tokenizer.encode(text) * 4),
    }
    worker = threading.Thread(target=works[kind])
    beats = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0.002)
        beats += 1
    # It takes at least 0.1 s. With the interpreter held there are a few, before it begins and when it is done.
    assert beats > 20


# ── bad text and ids ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_lone_surrogates_are_refused() -> None:
    tokenizer = build(byte_level_metadata() | {"tokenizer.chat_template": TEMPLATE})
    with pytest.raises(InvalidArgument, match=r"^text: got '\\udce4', expected valid Unicode; character 2"):
        tokenizer.encode(b"ab\xe4cd".decode("utf-8", errors="surrogateescape"))
    with pytest.raises(InvalidArgument, match=r"^text: got 3, expected a string"):
        tokenizer.encode(3)  # type: ignore[arg-type]


@pytest.mark.model
def test_lone_surrogates_in_messages_name_the_message(smollm2: Tokenizer) -> None:
    with pytest.raises(InvalidArgument, match=r"^messages\[1\]\.content: got '\\ud800'"):
        smollm2.encode_chat([{"role": "user", "content": "x"}, {"role": "user", "content": "\ud800"}])
    with pytest.raises(InvalidArgument, match=r"^messages: got"):
        smollm2.encode_chat([])


@pytest.mark.parametrize("token_id", [-1, 265, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused(token_id: int) -> None:
    with pytest.raises(InvalidArgument, match=rf"^token_ids: got {token_id}, expected a token id in \[0, 265\)"):
        build(byte_level_metadata()).decode([5, token_id])


@pytest.mark.model
def test_header_is_all_that_is_read() -> None:
    metadata = GGUFFile(require_default_model().path).metadata
    assert gguf_tokenizer.build(metadata, "model")[1].eos == (2,)
