"""Writes tests/data/smollm2_token_ids.json: what transformers makes of awkward texts, read from the same GGUF file.

python tests/golden/make_token_ids.py
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoTokenizer

from engine.model_source import cached_default

TARGET = Path(__file__).parents[1] / "data" / "smollm2_token_ids.json"
TEXTS = (
    "",
    " ",
    "a",
    "  two spaces",
    "Hello, world!",
    "I'll say we've DON'T it's",
    "tabs\t\tand\n\n\nnewlines \r\n",
    "numbers 1 12 123 1234567 3.14 1,000",
    "spaces before digits:   12  345",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    "héllo wörld, naïve façade",
    "你好，世界。日本語のテキスト",
    "Привет мир, שלום, مرحبا",
    "😀👩‍👩‍👧‍👦🚀🇩🇪",
    "e\u0301 combining, \u200b zero width, \ufeff mark, \ufffd replacement",
    "<|im_start|>user\nspelled out<|im_end|>",
    "<|endoftext|><|unknown|>",
    "null \x00 and bell \x07",
    "x" * 100,
    '{"name": "f", "arguments": {"a": [1, 2.5, null]}}',
    "∀x∈ℝ: ⌈x⌉ = −⌊−x⌋",
)
CHATS = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 12 + 30?"}],
    [
        {"role": "user", "content": "你好 😀"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "  indented\n"},
    ],
)


def main() -> None:
    path = cached_default()
    if path is None:
        raise SystemExit("the default model is not in the cache; make test fetches it")
    oracle = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    texts = [{"text": text, "token_ids": oracle.encode(text)} for text in TEXTS]
    chats = [
        {
            "messages": chat,
            "token_ids": oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False),
        }
        for chat in CHATS
    ]
    lines = [json.dumps(entry, ensure_ascii=True) for entry in [*texts, *chats]]
    TARGET.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
