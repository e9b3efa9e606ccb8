"""Services that cannot be: exit code 2, one line, and nothing left running."""

from __future__ import annotations

import pytest

from tests.e2e.service import error_of, tandem
from tests.golden.default_model import require_default_model


def serve(tmp_path, config: str = "", *arguments: str) -> str:
    file = tmp_path / "tandem.yaml"
    file.write_text(config)
    return error_of(
        tandem("serve", "--config", str(file), "--address", "none", "--grpc-port", "0", *arguments, timeout_s=60)
    )


def test_an_unknown_model(tmp_path):
    assert "model 'smollm3' not found; known: the default model" in serve(tmp_path, "", "--model", "smollm3")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "is not a GGUF file"), (b"not a model", "is not a GGUF file"), (b"GGUF\3\0\0\0", "truncated")],
)
def test_a_corrupt_model(tmp_path, content, expected):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    error = serve(tmp_path, "", "--model", str(path))
    assert error.startswith(str(path))
    assert expected in error


@pytest.mark.model
def test_a_truncated_model(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(require_default_model().path.read_bytes()[:50_000_000])
    assert "truncated" in serve(tmp_path, "", "--model", str(path))


def test_an_unknown_key(tmp_path):
    error = serve(tmp_path, "engine:\n  kv_cache_byte: 1\n")
    assert error.endswith("tandem.yaml:2: engine.kv_cache_byte: unknown key, nearest known key: engine.kv_cache_bytes")


@pytest.mark.model
def test_too_little_memory_for_one_block(tmp_path):
    """Found by the workers, told by the service."""
    require_default_model()
    error = serve(tmp_path, "engine: {kv_cache_bytes: 1000}\n")
    assert error.startswith("worker ")
    assert "kv_cache_bytes: got 1000" in error
