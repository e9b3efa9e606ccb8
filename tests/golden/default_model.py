"""The default model for tests: from the cache, never from the network."""

from __future__ import annotations

import pytest

from engine.model_source import ModelFiles, cached_default, default_cache


def require_default_model() -> ModelFiles:
    """The default model's files; skips the test when they are not in the cache (`make test` fetches them first)."""
    path = cached_default()
    if path is None:
        pytest.skip(f"the default model is not in {default_cache()}; make test fetches it")
    return ModelFiles("gguf", path)
