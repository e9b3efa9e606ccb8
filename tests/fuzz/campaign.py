"""A million inputs for every target, found by what they make the code do (atheris, libFuzzer): `make fuzz`.

    python -m tests.fuzz.campaign [--inputs 1000000] [--jobs 2] [--seed 1] [target …]

Each target runs in a process of its own, which may take only so much more memory than it had to begin with. One that
crashes, takes longer than LIMIT_S for an input or asks for too much memory ends there, and its input is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

# Of one input, in seconds; and in MiB beyond what the process took before the first.
LIMIT_S = 10
LIMIT_MIB = 256
LONGEST_INPUT = 8192
PACKAGES = ["cluster", "decode_worker", "engine", "kvtransfer", "prefill_worker"]
# These only stand in for time and for a model: what inputs make them do is nothing to search for.
STAND_INS = ["cluster.planning.virtual_loop", "engine.emulated_kv", "engine.emulated_runner"]


class Arguments(argparse.Namespace):
    targets: list[str]
    inputs: int
    jobs: int
    seed: int
    child: str


def child(name: str, inputs: int, seed: int) -> None:
    """One target, in this process, which ends with it: here is where libFuzzer lives."""
    import atheris

    with atheris.instrument_imports(include=PACKAGES, exclude=STAND_INS, enable_loader_override=False):
        from tests.fuzz.test_parsers import TARGETS

    target = next(target for target in TARGETS if target.name == name)
    corpus = Path("corpus")
    corpus.mkdir()
    for number, example in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(example)
    runs, slowest_s, start_s, at_first_kib = 0, 0.0, time.perf_counter(), 0

    def once(data: bytes) -> None:
        nonlocal runs, slowest_s, at_first_kib
        began_s = time.perf_counter()
        target(data)
        if runs == 1000:
            # What is made once has been made by now.
            at_first_kib = _peak_kib()
        elif runs > 1000 and (took_s := time.perf_counter() - began_s) > slowest_s:
            slowest_s = took_s
            Path("slowest").write_bytes(data)
        runs += 1
        # Now and then, so that something is known of one that does not come to its end.
        if runs == inputs or runs % 50_000 == 0:
            measured = {
                "inputs": runs,
                "seconds": time.perf_counter() - start_s,
                "slowest_ms": 1000 * slowest_s,
                "grown_mib": (_peak_kib() - at_first_kib) / 1024,
                # Of which this much is libFuzzer's: inputs that reached something new, all of which it holds.
                "kept_mib": sum(file.stat().st_size for file in corpus.iterdir()) / (1 << 20),
            }
            Path("measured.json").write_text(json.dumps(measured))

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + (LIMIT_MIB << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    options = [
        f"-runs={inputs + 1}",
        f"-max_len={LONGEST_INPUT}",
        f"-timeout={LIMIT_S}",
        "-verbosity=1",
        f"-seed={seed}",
    ]
    atheris.Setup([sys.argv[0], *options, "-rss_limit_mb=0", str(corpus)], once)
    atheris.Fuzz()


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def campaign(name: str, inputs: int, folder: Path, seed: int = 1) -> dict[str, float]:
    """What a child has measured; {} where it did not come to its end."""
    place = folder / name
    place.mkdir()
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.campaign",
        "--child",
        name,
        "--inputs",
        str(inputs),
        "--seed",
        str(seed),
    ]
    # This checkout's, whichever one is installed.
    path = os.pathsep.join((os.getcwd(), os.path.join(os.getcwd(), "proto")))
    with (place / "log").open("w") as log:
        subprocess.run(command, cwd=place, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"PYTHONPATH": path})
    file = place / "measured.json"
    found: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    return found if found.get("inputs") == inputs else {}


def report(names: Sequence[str], results: Sequence[dict[str, float]]) -> Table:
    figures = ("inputs", "seconds", "slowest_ms", "grown_mib", "kept_mib")
    table = Table("", title="fuzzing")
    for figure in figures:
        table.add_column(figure.replace("_mib", " MiB").replace("_", " "), justify="right")
    for name, found in zip(names, results, strict=True):
        table.add_row(name, *(f"{found[figure]:,.0f}" if found else "failed" for figure in figures))
    return table


def main() -> None:
    """Prints one row per target; exits 1 where one has failed, and says where its input is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="target")
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1, help="another one searches elsewhere")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args(namespace=Arguments())
    if arguments.child:
        child(arguments.child, arguments.inputs, arguments.seed)
    from tests.fuzz.test_parsers import TARGETS

    known = [target.name for target in TARGETS]
    names = arguments.targets or known
    if unknown := set(names) - set(known):
        parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    folder = Path(tempfile.mkdtemp(prefix="tandem-fuzz-"))
    with ThreadPoolExecutor(arguments.jobs) as pool:
        results = list(pool.map(partial(campaign, inputs=arguments.inputs, folder=folder, seed=arguments.seed), names))
    Console(width=100).print(report(names, results))
    if not all(results):
        print(f"logs and inputs: {folder}")
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
