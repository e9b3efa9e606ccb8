"""docs/quick-start.md walked from top to bottom, as a newcomer would: `python -m tests.e2e.walk FOLDER`.

FOLDER is a fresh copy of the repository. What is to run "until Ctrl-C" runs beside the rest. Prints what each block
printed; exit code 1 where one failed or did not say what it should.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

READY = "\ntry:"
START_S = 240.0
STEP_S = 300.0
# What the blocks after the service's start say, by a part of their first command.
SAYS = {
    'tandem generate "': "Paris",
    "/v1/chat/completions": "Paris",
    "tandem status": "prefill-0",
    "prompts.jsonl": '"id": 2',
    "config check": "in good order",
}


def blocks(page: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", page, re.DOTALL)


@contextmanager
def service(command: str, folder: Path) -> Iterator[None]:
    """What `command` serves, until it is interrupted, as by Ctrl-C."""
    file = folder / "service.log"
    with file.open("w") as log:
        process = subprocess.Popen(
            ["bash", "-ec", command], cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        give_up_s = time.monotonic() + START_S
        while READY not in file.read_text():
            assert process.poll() is None, file.read_text()
            assert time.monotonic() < give_up_s, f"not ready after {START_S:g} s: {file.read_text()}"
            time.sleep(0.2)
        yield
    finally:
        # A terminal sends it to all that run in it.
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(60)
    # The shell that it runs in may end by the signal, make with 2.
    assert code in (0, 2, 130, -signal.SIGINT), f"{code}: {file.read_text()}"
    assert "shutting down" in file.read_text()


def step(block: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-ec", block], cwd=folder, capture_output=True, text=True, timeout=STEP_S, check=False
    )
    print(f"$ {block}{done.stdout}{done.stderr}", flush=True)
    assert done.returncode == 0, block
    for part, said in SAYS.items():
        assert part not in block or said in done.stdout, f"expected {said!r} from: {block}"


def walk(folder: Path) -> None:
    steps = blocks((folder / "docs" / "quick-start.md").read_text())
    at = steps.index("make serve\n")
    for block in steps[:at]:
        step(block, folder)
    # A shell of its own for each block, but for what one sets for those after it.
    first, *others = steps[at + 1 :]
    path, _, first = first.partition("\n")
    assert path.startswith("export PATH="), path
    with service(steps[at], folder):
        for block in [first, *others]:
            step(f"{path}\n{block}", folder)
    with service(f"{path}\ntandem serve --config tandem.yaml", folder):
        step(f"{path}\n{first}", folder)


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    walk(Path(sys.argv[1]))
