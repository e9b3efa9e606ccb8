"""The commands and the program on the pages, run as they stand there against a real service."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.service import TANDEM, Served, serving
from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model]
ROOT = Path(__file__).parents[2]
DEFAULT_URL = "127.0.0.1:50051"
PROMPTS = (
    {"id": 1, "prompt": "One, two,"},
    {"id": "b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    """Every `tandem generate` and `tandem status` on the pages. `serve` and `worker` have tests of their own."""
    lines = [
        line for page in ("README.md", "docs/api.md") for block in blocks(page, "bash") for line in block.splitlines()
    ]
    found = [re.sub(r"^\.venv/bin/", "", line.partition("#")[0].strip()) for line in lines]
    return sorted({line for line in found if re.match(r"tandem (generate|status)\b", line)})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    require_default_model()
    with serving(tmp_path_factory.mktemp("pages"), "--address", "none") as served:
        yield served


def test_there_are_commands() -> None:
    assert len(commands()) >= 5


@pytest.mark.parametrize("command", commands())
def test_command(served: Served, tmp_path: Path, command: str) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    (tmp_path / "acme.key").write_text("a-key-that-a-service-which-does-not-ask-does-not-look-at\n")
    words = shlex.split(command)[1:]
    if "--url" in words:
        words[words.index("--url") + 1] = served.address
    elif "--local" not in words:
        words += ["--url", served.address]
    if "generate" in words and "--max-tokens" not in words:
        words += ["--max-tokens", "8"]
    done = subprocess.run([*TANDEM, *words], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if "--json" in words:
        assert all(json.loads(line) for line in done.stdout.splitlines())
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [block for block in blocks("docs/http.md", "bash") if block.startswith("curl")])
def test_curl(served: Served, command: str) -> None:
    done = subprocess.run(
        ["bash", "-ec", command.replace("http://127.0.0.1:8000/v1", served.openai_url)],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choices"][0]["message"]["content"]


@pytest.mark.parametrize("program", blocks("docs/http.md", "python"))
def test_openai_program(served: Served, tmp_path: Path, program: str) -> None:
    file = tmp_path / "program.py"
    file.write_text(program.replace("http://127.0.0.1:8000/v1", served.openai_url))
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


def test_program(served: Served, tmp_path: Path) -> None:
    (program,) = (block for block in blocks("README.md", "python") if "tandem.client" in block)
    file = tmp_path / "program.py"
    file.write_text(program.replace(DEFAULT_URL, served.address))
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()
