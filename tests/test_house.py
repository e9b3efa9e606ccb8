"""The house rules that a machine can check: which way imports go, who may touch what, sizes, and what the pages say."""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "engine", "kvtransfer", "prefill_worker", "decode_worker", "cluster", "bench")
# Who may import whom, itself excepted. The two worker packages never import each other.
MAY_IMPORT = {
    "kernels": set(),
    "engine": {"kernels"},
    "kvtransfer": {"kernels", "engine", "tandem"},
    "prefill_worker": {"kernels", "engine", "kvtransfer", "tandem"},
    "decode_worker": {"kernels", "engine", "kvtransfer", "tandem"},
    "cluster": {"kernels", "engine", "kvtransfer", "prefill_worker", "decode_worker", "tandem"},
    "bench": {"kernels", "engine", "kvtransfer", "prefill_worker", "decode_worker", "cluster", "tandem"},
}
RAY_FILES = {
    "cluster/actors.py",
    "cluster/launcher.py",
    "cluster/ray_address.py",
    "cluster/ray_seats.py",
    "cluster/ray_service.py",
}
# Files whose job is the wire, and the benchmarks, which are clients.
GRPC_FILE = re.compile(
    r"kvtransfer/(rpc\w*|grpc_transport)\.py|\w+_worker/(server|grpc_transport)\.py|bench/\w+\.py|"
    r"cluster/(inference_server|guarded_calls|kserve/server|registry_server|calls|actors|\w+_process|commands/\w+)\.py"
)
# Plain Python on plain values: a decider never sees a tensor, a socket or a clock.
PURE_FILES = (
    "engine/block_audit.py",
    "engine/block_pool.py",
    "engine/chunking.py",
    "engine/prefix_hash.py",
    "engine/slack_queue.py",
    "engine/pool_counts.py",
    "engine/shard.py",
    "prefill_worker/scheduler.py",
    "decode_worker/scheduler.py",
    "decode_worker/sequence.py",
    "decode_worker/ahead.py",
    "decode_worker/flight.py",
    "decode_worker/rows.py",
    "kvtransfer/receive.py",
    "decode_worker/selection.py",
    "decode_worker/local_prompts.py",
    "engine/kv_events.py",
    "engine/learned_cost.py",
    "engine/multi_step.py",
    "engine/urgency.py",
    "decode_worker/links.py",
    "decode_worker/pulls.py",
    "decode_worker/repeat.py",
    "decode_worker/running.py",
    "prefill_worker/job.py",
    "cluster/controller.py",
    "cluster/demand.py",
    "cluster/history.py",
    "cluster/ledger.py",
    "cluster/outcomes.py",
    "cluster/prefix_index.py",
    "cluster/recent_requests.py",
    "cluster/registry.py",
    "cluster/report_checks.py",
    "cluster/restarts.py",
    "cluster/retry_budget.py",
    "cluster/tally.py",
    "cluster/token_flow.py",
    "cluster/metrics/families.py",
    "cluster/metrics/request_metrics.py",
    "cluster/metrics/worker_metrics.py",
    "cluster/security/caller.py",
    "cluster/security/quotas.py",
    "engine/refusal_log.py",
    "cluster/security/token_bucket.py",
    "cluster/planning/arrivals.py",
    "cluster/planning/capacity.py",
    "cluster/planning/cost_model.py",
    "cluster/planning/emulation_result.py",
    "cluster/planning/measured_law.py",
    "cluster/planning/operator_law.py",
    "cluster/planning/step_law.py",
    "cluster/planning/refit.py",
    "cluster/planning/queueing.py",
    "cluster/planning/placement.py",
    "cluster/planning/planner.py",
    "cluster/complaints.py",
    *(f"cluster/routing/{path.name}" for path in sorted((ROOT / "cluster" / "routing").glob("*.py"))),
)
IMPURE = {"torch", "grpc", "ray", "asyncio", "time", "threading", "socket", "os"}
COMMANDS = "serve|generate|status|worker|demo|emulate|plan|profile|bench|chaos|certs|keys|config|top|gateway|health"
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 70


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports_of(path: Path) -> set[str]:
    """Top-level names of every module that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute here"
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    package, name = path.relative_to(ROOT).parts[0], str(path.relative_to(ROOT))
    ours = imports_of(path) & {*PACKAGES, "tandem"}
    assert ours <= MAY_IMPORT[package] | {package}
    if name not in RAY_FILES:
        assert "ray" not in imports_of(path)
    if not GRPC_FILE.fullmatch(name):
        assert not imports_of(path) & {"grpc", "grpc_health", "grpc_reflection"}
    if name in PURE_FILES:
        assert not imports_of(path) & IMPURE


def test_pure_files_exist() -> None:
    assert [name for name in PURE_FILES if not (ROOT / name).exists()] == []


def test_no_cycles() -> None:
    """Module by module: the direction between packages says nothing about cycles inside one."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources()}
    graph = {name: set(module_imports(path)) & set(modules) for name, path in modules.items()}
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"imports go round: {' → '.join((*above, name))}"
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def module_imports(path: Path) -> Iterator[str]:
    """Full names of modules imported at the top of a file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_one_file_is_one_noun(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    if path.name != "__init__.py" or text:
        assert ast.get_docstring(tree), "every file opens by saying what it is"
    assert text.count("\n") <= MAX_FILE_LINES, "is it still one noun?"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, f"{node.name} is too long"


def test_proto_is_no_package() -> None:
    """`import proto` belongs to proto-plus, which Ray brings along."""
    assert not (ROOT / "proto" / "__init__.py").exists()
    assert (ROOT / "kernels" / "__init__.py").read_text(encoding="utf-8") == "", "transformers probes a `kernels`"


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_files_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{'|'.join(PACKAGES)}|proto|docs|tests|deploy)/[\w./-]+)`", text))
    named |= {str((page.parent / link).relative_to(ROOT)) for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text)}
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


@pytest.mark.parametrize("page", pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_commands_that_exist(page: Path) -> None:
    """Each `make X` is a target, each `python -m bench.X` a module, each `tandem X --flag` an option of X."""
    code = "\n".join(re.findall(r"```\w*\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for line in code.splitlines():
        for words in re.findall(r"^\s*(?:\$ )?make ((?:[\w-]+ ?)+)", line):
            assert set(words.split()) <= targets, line
        for module in re.findall(r"python -m (bench\.\w+)", line):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), line
        for command, rest in re.findall(rf"tandem ({COMMANDS})\b([^|#]*)", line):
            second = rest.split()[0] if command in ("worker", "keys", "config") else ""
            unknown = set(re.findall(r"(--[\w-]+)", rest)) - options_of(f"{command} {second}".strip())
            assert not unknown, f"{line}: {command} has no {unknown}"


@functools.cache
def options_of(command: str) -> set[str]:
    script = "from cluster.cli import main; main()"
    path = os.pathsep.join((str(ROOT), str(ROOT / "proto")))
    environment = {**os.environ, "PYTHONPATH": path, "COLUMNS": "200", "NO_COLOR": "1"}
    words = [sys.executable, "-c", script, *command.split(), "--help"]
    shown = subprocess.run(words, capture_output=True, text=True, env=environment, check=True)
    return set(re.findall(r"(--[\w-]+)", shown.stdout))


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest would import the second one as the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_no_test_brings_ray_into_the_process_of_others() -> None:
    """Whether Ray asks for a token is settled once in a process: tests/e2e/test_on_ray.py."""
    files = [path for path in (ROOT / "tests").rglob("*.py") if not path.name.endswith("_cases.py")]
    own = {"tests/deploy/ray_up/caller.py"}  # A program of its own.
    wanted = re.compile(r"^\s*(ray\.init\(|from cluster\.(launcher|ray_thread|ray_seats) import)", re.MULTILINE)
    found = {path.relative_to(ROOT).as_posix() for path in files if wanted.search(path.read_text())}
    assert found <= own
