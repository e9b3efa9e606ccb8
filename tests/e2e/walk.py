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


class Service:
    """What a command serves until it is interrupted, as by Ctrl-C."""

    def __init__(self, command: str, folder: Path) -> None:
        self._log = folder / "service.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                ["bash", "-ec", command], cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        give_up_s = time.monotonic() + START_S
        while READY not in self._log.read_text():
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < give_up_s, f"not ready after {START_S:g} s: {self._log.read_text()}"
            time.sleep(0.2)

    def interrupt(self) -> None:
        # A terminal sends it to all that run in it.
        os.killpg(self._process.pid, signal.SIGINT)
        assert self._process.wait(60) in (0, 2, 130), self._log.read_text()
        assert "shutting down" in self._log.read_text()


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
    service = Service(steps[at], folder)
    # A shell of its own for each block, but for what one sets for those after it.
    first, *others = steps[at + 1 :]
    path, _, first = first.partition("\n")
    assert path.startswith("export PATH="), path
    for block in [first, *others]:
        step(f"{path}\n{block}", folder)
    service.interrupt()
    again = Service(f"{path}\ntandem serve --config tandem.yaml", folder)
    step(f"{path}\n{first}", folder)
    again.interrupt()


if __name__ == "__main__":
    subprocess.run(["ip", "link", "set", "lo", "up"], check=False)
    walk(Path(sys.argv[1]))
