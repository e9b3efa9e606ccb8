"""Every piece of configuration on the pages is one that the service takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from cluster.config import TandemConfig
from cluster.worker_config import most_ranks

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = set(TandemConfig.model_fields)
# What is wrong on purpose with a piece alone: the rest of it is in another piece, or in files that are not there.
INCOMPLETE = ("tenants and auth.operators go with", "both ends, or neither")


def pieces() -> list[tuple[str, str]]:
    """Page and text of every block of YAML whose keys are sections of the configuration."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        blocks += re.findall(r"tandem[\w.-]*\.yaml <<'EOF'\n(.*?)EOF", text, re.DOTALL)
        for block in blocks:
            values = next(iter(yaml.safe_load_all(block)))
            if isinstance(values, dict) and values.keys() <= SECTIONS:
                found.append((str(page.relative_to(ROOT)), block))
    return found


def test_there_are_pieces() -> None:
    assert len(pieces()) >= 8


@pytest.mark.parametrize(("page", "piece"), pieces())
def test_the_service_takes_it(page: str, piece: str) -> None:
    try:
        TandemConfig.model_validate(yaml.safe_load(piece))
    except ValidationError as error:
        problems = [problem["msg"] for problem in error.errors()]
        assert all(any(known in problem for known in INCOMPLETE) for problem in problems), f"{page}: {problems}"


def test_what_stands_for_a_command_of_vllms_takes_as_many_gpus() -> None:
    text = (ROOT / "docs" / "from-vllm.md").read_text(encoding="utf-8")
    (gpus,) = re.findall(r"^vllm serve .*--tensor-parallel-size (\d+)", text, re.MULTILINE)
    (piece,) = [piece for page, piece in pieces() if page == "docs/from-vllm.md"]
    config = TandemConfig.model_validate(yaml.safe_load(piece))
    assert most_ranks(config) == int(gpus)
    assert config.cluster.grpc_host == "0.0.0.0", "vLLM listens there"
    (flags,) = re.findall(r"^\| `--data-parallel-size N` \| `([^`]*)`", text, re.MULTILINE)
    counts = {flag: 7 if count == "N" else int(count) for flag, count in re.findall(r"--(\w+) (\w+)", flags)}
    assert most_ranks(TandemConfig.model_validate({"cluster": counts})) == 7
