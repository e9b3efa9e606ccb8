"""The name by which a model is asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.served_model import served_name
from engine.config import DEFAULT_MODEL
from engine.model_source import ModelFiles


@pytest.mark.parametrize(
    ("model", "files", "expected"),
    [
        (DEFAULT_MODEL, ModelFiles("gguf", Path("/cache/SmolLM2-135M-Instruct.Q4_1.gguf")), DEFAULT_MODEL),
        ("/models/one.Q4_1.gguf", ModelFiles("gguf", Path("/models/one.Q4_1.gguf")), "one.Q4_1"),
        ("/models/one/", ModelFiles("hf", Path("/models/one/")), "one"),
        ("some/model", ModelFiles("hf", Path("/hub/snapshots/12fd25f"), "some/model"), "some/model"),
        # A folder that is there goes before the hub.
        ("some/model", ModelFiles("hf", Path("some/model")), "model"),
    ],
)
def test_a_model_is_named_for_what_it_is_not_where_it_lies(model: str, files: ModelFiles, expected: str) -> None:
    assert served_name(model, files) == expected
