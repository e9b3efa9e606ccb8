"""What docs/ray.md tells to do with machines that are there already, done once over ssh on two of them: `ray up`,
`tandem serve` on the head, the same as a job, `ray down`.

    python -m tests.deploy.ray_up.rehearsal FOLDER WHEELS MODEL      in namespaces of its own: machines.alone

Whatever does not go as it should is an AssertionError or a CalledProcessError.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.deploy.ray_up.caller import RAY, edited, machines, ray, settle
from tests.deploy.ray_up.machines import FOLDER, prepare

POOLS = {"head": "decode", "worker": "prefill"}
WAIT_S = 600.0
QUESTION = ("The capital of France is", "--temperature", "0", "--max-tokens", "6")
# Longer than `ray job stop` takes to come through, shorter than that and `drain_s`.
LONG_S = 15.0
SERVE = "tandem serve --config ~/tandem/deploy/ray/tandem.yaml"
# Ray's processes, and those that it runs.
OF_RAY = re.compile(r"raylet|gcs_server|ray::|/ray/dashboard/|tandem serve")


def main(folder: Path, wheels: Path, model: Path) -> None:
    prepare(folder, wheels)
    home = settle()
    at = machines(home, POOLS, model)
    cluster = edited(
        home / "tandem" / "deploy" / "ray" / "cluster.yaml",
        {"10.0.0.10": at["head"], "10.0.0.11": at["worker"], "ubuntu": "root", "~/.ssh/id_ed25519": "~/.ssh/cluster"},
    )
    ray("get-auth-token", "--generate")
    head = Head(str(cluster), at)
    with step("ray up"):
        ray("up", "--yes", str(cluster))
        head.wait_for_all()
    with step("tandem serve --address auto"):
        serve(head)
    with step("ray up with a changed checkout"):
        (home / "tandem" / "README.md").write_text("Changed.")
        ray("up", "--yes", str(cluster))
        head.wait_for_all()
        assert all((FOLDER / name / "home" / "tandem" / "README.md").read_text() == "Changed." for name in POOLS)
    with step("ray job submit"):
        submit(head)
    with step("ray down"):
        ray("down", "--yes", str(cluster))
        eventually(lambda: not processes())


class Head:
    """The head of the cluster, by way of `ray exec`."""

    def __init__(self, cluster: str, addresses: dict[str, str]) -> None:
        self.cluster = cluster
        self.addresses = addresses

    def run(self, command: str) -> str:
        return ray("exec", self.cluster, command)

    def wait_for_all(self) -> None:
        """Until Ray counts all machines."""
        eventually(lambda: f" {len(POOLS)} local.cluster.node\n" in self.run("ray status").replace("\r", ""))

    def start(self, command: str) -> subprocess.Popen[str]:
        print(f"$ ray exec {self.cluster} '{command}' &", flush=True)
        # In a group of its own, as from a shell: what ends it ends its ssh too.
        return subprocess.Popen([RAY, "exec", self.cluster, command], stdin=subprocess.DEVNULL, process_group=0)

    @property
    def url(self) -> str:
        return f"{self.addresses['head']}:50051"

    def tandem(self, *arguments: str) -> Any:
        """The one object that a command of `tandem`, called on this side, prints as JSON."""
        command = [sys.executable, "-m", "cluster.cli", *arguments, "--url", self.url, "--json"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    def is_serving(self) -> bool:
        command = [sys.executable, "-m", "cluster.cli", "status", "--url", self.url, "--json"]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return result.returncode == 0 and len(json.loads(result.stdout)["workers"]) == len(POOLS)

    def check_answers(self) -> float:
        """A right answer, over both machines: each worker is on the node with its label. Seconds per token."""
        print(answer := self.tandem("generate", *QUESTION), flush=True)
        assert answer["text"].startswith(" Paris"), answer
        workers = {worker["role"]: worker["address"].rpartition(":")[0] for worker in self.tandem("status")["workers"]}
        assert workers == {pool: self.addresses[name] for name, pool in POOLS.items()}, workers
        return float(answer["receipt"]["tpot_s"])


def serve(head: Head) -> None:
    """In the foreground of a terminal, and ended with it."""
    service = head.start(SERVE)
    eventually(head.is_serving)
    head.check_answers()
    os.killpg(service.pid, signal.SIGINT)
    service.wait(WAIT_S)
    eventually(lambda: not processes(re.compile("tandem serve|WorkerActor")))


def submit(head: Head) -> None:
    """As a job, which is stopped while it answers: the answer is finished first."""
    head.run(f"ray job submit --no-wait --submission-id tandem -- {SERVE}")
    eventually(head.is_serving)
    head.check_answers()
    head.run("pkill -HUP -x tandem")
    eventually(lambda: "all workers have been restarted" in head.run("ray job logs tandem"))
    tokens = min(1900, max(100, int(LONG_S / head.check_answers())))
    answer = ["generate", "Once upon a time", "--temperature", "0", "--max-tokens", str(tokens)]
    command = [sys.executable, "-m", "cluster.cli", *answer, "--url", head.url, "--json"]
    client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    eventually(lambda: any(worker["running"] for worker in head.tandem("status")["workers"]))
    head.run("ray job stop tandem")
    stdout, stderr = client.communicate(timeout=WAIT_S)
    assert client.returncode == 0, stderr
    print(json.loads(stdout)["usage"], flush=True)
    log = head.run("ray job logs tandem")
    assert "shutting down" in log
    assert "Traceback" not in log
    assert "was stopped" in head.run("ray job status tandem")
    # Without that the same job could not be submitted again.
    head.run("ray job delete tandem")
    eventually(lambda: not processes(re.compile("tandem serve|WorkerActor")))


def processes(kind: re.Pattern[str] = OF_RAY) -> list[str]:
    """Command lines of what runs on the machines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_text().replace("\0", " ")
        except OSError:
            continue
        # The commands of this side have the same words.
        if kind.search(line) and "ray exec" not in line and not line.startswith("ssh "):
            found.append(line)
    return found


def eventually(holds: Callable[[], bool]) -> None:
    give_up_s = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < give_up_s, f"not so within {WAIT_S:g} s; there are {processes()}"
        time.sleep(0.5)


@contextmanager
def step(name: str) -> Iterator[None]:
    print(f"── {name}", flush=True)
    began_s = time.monotonic()
    yield
    print(f"── {name}: {time.monotonic() - began_s:.0f} s", flush=True)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]))
