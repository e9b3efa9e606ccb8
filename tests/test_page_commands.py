"""No command on a page is there untried: each is run by a test as it stands, or by one that is named here, or it is
said why it is not run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")] + sorted((ROOT / "docs").glob("*.md"))
# Where a command is run: a test's file, or the file that runs it in CI.
RUN = {
    r"(\.venv/bin/)?tandem (generate|status|config|top)\b": "tests/e2e/test_pages.py",
    r"(text=|grpcurl )": "tests/e2e/test_pages.py",
    r"curl ": "tests/e2e/test_pages.py",
    r"make (demo|serve)\b|export PATH=\"\$PWD|cat > (prompts\.jsonl|tandem\.yaml)": "tests/e2e/test_walk.py",
    r"make test\b": ".ci/run",
    r"tandem serve\b": "tests/e2e/test_processes.py",
    r"tandem worker\b": "tests/e2e/test_parts.py",
    r"kill -HUP": "tests/e2e/test_rolling_restart.py",
    r"tandem chaos\b": "tests/e2e/test_chaos.py",
    r"tandem (keys|certs)\b": "tests/e2e/test_secured.py",
    r"tandem (plan|emulate|profile)\b": "tests/planning",
    r"tandem bench\b": "tests/loadtest",
    r"(kubectl|docker|kind|openssl|\(printf) ": "tests/deploy/test_kubernetes_page.py",
    r"(ray|ssh|git|cp|python3 -m venv|~/ray-up/bin/pip install -c|export PATH=\$HOME\S*) ": "tests/deploy/ray_up",
    r"(\.venv/bin/python -m|(sudo )?make) (bench|chaos|soak|fuzz)": "Makefile",
}
# What no test runs, and why.
NOT_RUN = {
    r"vllm serve": "another program",
    r"nano ": "an editor",
    r"(aws|gcloud|~/ray-up/bin/pip install (boto3|google))": "needs an account with a cloud",
    r"pip install -c constraints\.txt -e '\.\[tracing\]'": "done by `make`, which installs what tests need",
}


def commands() -> list[tuple[str, str]]:
    """Page and first line of every command in a block of bash."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            # What a command reads from here, and lines that go on, are no commands.
            plain = re.sub(r"<<'EOF'\n.*?\nEOF\n", "\n", block, flags=re.DOTALL)
            lines = re.sub(r"\\\n\s*|\n  +", " ", plain).splitlines()
            found += [(str(page.relative_to(ROOT)), line) for line in lines if line.strip()]
    return found


def test_there_are_commands() -> None:
    assert len(commands()) > 100


@pytest.mark.parametrize(("page", "command"), commands())
def test_a_command_is_tried_or_it_is_said_why_not(page: str, command: str) -> None:
    where = [place for pattern, place in RUN.items() if re.match(pattern, command)]
    why = [reason for pattern, reason in NOT_RUN.items() if re.match(pattern, command)]
    assert where or why, f"{page}: nothing runs {command!r}"
    assert all((ROOT / place).exists() for place in where)
