"""The commands and the program on the pages, run as they stand there against a real service."""

from __future__ import annotations

import base64
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.e2e.foreign import NODE_MODULES, require_node, with_grpcurl
from tests.e2e.service import TANDEM, Served, serving
from tests.golden.default_model import require_default_model

pytestmark = [pytest.mark.model]
ROOT = Path(__file__).parents[2]
DEFAULT_URL = "127.0.0.1:50051"
# What the model says where the pages ask it greedily.
PARIS = "Paris"
PROMPTS = (
    {"id": 1, "prompt": "One, two,"},
    {"id": "b", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    """All on the pages that ask a running service, and those about a configuration. `serve` and others have tests of
    their own, and so have services with certificates."""
    pages = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    lines = [line for page in pages for block in blocks(page, "bash") for line in block.splitlines()]
    found = [re.sub(r"^\.venv/bin/", "", re.split(" [#>] ", line)[0].strip()) for line in lines]
    asking = re.compile(r"tandem (generate|status|top --once|config)\b")
    return sorted({line for line in found if asking.match(line) and "--ca" not in line})


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    require_default_model()
    with serving(tmp_path_factory.mktemp("pages"), "--address", "none") as served:
        yield served


def test_there_are_commands() -> None:
    assert len(commands()) >= 12
    assert len(blocks("docs/grpc.md", "bash")) == 3, "each has its test below"


@pytest.mark.parametrize("command", commands())
def test_command(served: Served, tmp_path: Path, command: str) -> None:
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    (tmp_path / "tandem.yaml").write_text("cluster: {decode: 2}\n")
    (tmp_path / "acme.key").write_text("a-key-that-a-service-which-does-not-ask-does-not-look-at\n")
    words = shlex.split(command)[1:]
    if "--url" in words:
        words[words.index("--url") + 1] = served.address
    elif "--local" not in words and "config" not in words:
        words += ["--url", served.address]
    if "generate" in words and "--max-tokens" not in words:
        words += ["--max-tokens", "8"]
    done = subprocess.run([*TANDEM, *words], cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if "schema" in words:
        assert json.loads(done.stdout)
    if "--json" in words:
        assert all(json.loads(line) for line in done.stdout.splitlines())
    assert done.stdout.strip()


@pytest.mark.parametrize("command", [block for block in blocks("docs/http.md", "bash") if block.startswith("curl")])
def test_curl(served: Served, command: str) -> None:
    printed = output_of(["bash", "-ec", here(command, served)])
    assert json.loads(printed)["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (" list", "inference.GRPCInferenceService"),
        ("Inference/Generate", PARIS),
        ("GRPCInferenceService/ModelInfer", '"finish_reason"'),
    ],
)
def test_grpcurl(served: Served, tmp_path: Path, method: str, said: str) -> None:
    (command,) = (block for block in blocks("docs/grpc.md", "bash") if block.rstrip().endswith(method))
    printed = output_of(["bash", "-ec", here(command, served)], env=with_grpcurl(tmp_path))
    assert said in printed
    if "ModelInfer" in method:
        (text,) = (output for output in json.loads(printed)["outputs"] if output["name"] == "text_output")
        assert PARIS in base64.b64decode(text["contents"]["bytesContents"][0]).decode()


@pytest.mark.parametrize("program", [*blocks("docs/http.md", "python"), *blocks("docs/grpc.md", "python")])
def test_python_program(served: Served, tmp_path: Path, program: str) -> None:
    file = tmp_path / "program.py"
    file.write_text(here(program, served))
    assert output_of([sys.executable, str(file)]).strip()


@pytest.mark.parametrize("program", [*blocks("docs/http.md", "js"), *blocks("docs/grpc.md", "js")])
def test_node_program(served: Served, tmp_path: Path, program: str) -> None:
    node = require_node()
    (tmp_path / "node_modules").symlink_to(NODE_MODULES)
    file = tmp_path / "program.mjs"
    file.write_text(here(program, served))
    said = output_of([node, str(file)])
    assert PARIS in said if "temperature: 0" in program else said


def test_program(served: Served, tmp_path: Path) -> None:
    (program,) = (block for block in blocks("README.md", "python") if "tandem.client" in block)
    file = tmp_path / "program.py"
    file.write_text(here(program, served))
    assert output_of([sys.executable, str(file)]).strip()


def here(text: str, served: Served) -> str:
    """What stands on a page, with the service's own addresses."""
    return text.replace("http://127.0.0.1:8000/v1", served.openai_url).replace(DEFAULT_URL, served.address)


def output_of(command: list[str], env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=90, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout
