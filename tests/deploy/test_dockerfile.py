"""The image's recipe as far as it can be read without building it: what it copies, what it installs, how it runs."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import tomllib
from pathlib import Path

import typer

from cluster.cli import app
from tests.deploy.rendered import ROOT

DOCKERFILE = (ROOT / "deploy" / "docker" / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """(name, arguments) of each, continued lines joined and comments left out."""
    lines = [line for line in DOCKERFILE.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for name, rest in instructions():
        if name == "FROM":
            base, _, stage = rest.partition(" AS ")
            found[stage] = [(name, base)]
        elif found:
            found[list(found)[-1]].append((name, rest))
    return found


def context() -> list[str]:
    """What of the repository .dockerignore lets into the build: the last of its lines that matches decides."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]

    def is_in(path: str) -> bool:
        parents = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        ignored = False
        for rule in rules:
            pattern = rule.removeprefix("!")
            names = [Path(each).name for each in parents] if pattern.startswith("**/") else parents
            if any(fnmatch.fnmatch(name, pattern.removeprefix("**/")) for name in names):
                ignored = not rule.startswith("!")
        return not ignored

    return [path for path in listed.splitlines() if is_in(path)]


def test_it_is_torch_first_and_the_same_as_everywhere() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (torch,) = re.findall(r"^TORCH := (.*)$", makefile, re.MULTILINE)
    assert ("ARG", f"TORCH={torch}") in stages()["build"]
    installs = [rest for name, rest in stages()["build"] if name == "RUN" and "pip install" in rest]
    assert '"${TORCH}"' in installs[0]
    assert "-c constraints.txt" in installs[1]


def test_every_package_is_in_the_build_and_nothing_private() -> None:
    inside = context()
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    for package in packages:
        folder = package.replace(".", "/")
        folder = f"proto/{folder}" if package.startswith("tandem") else folder
        assert any(path.startswith(f"{folder}/") for path in inside), package
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= set(inside)
    assert not [path for path in inside if path.startswith(("tests/", "docs/", "deploy/", ".git", ".ci"))]


def test_stages_are_copied_from_stages_that_exist() -> None:
    found = stages()
    for stage, steps in found.items():
        before = list(found)[: list(found).index(stage)]
        for name, rest in steps:
            if name == "FROM":
                assert rest in ("${PYTHON_IMAGE}", *before)
            if name == "COPY" and (source := re.search(r"--from=(\S+)", rest)):
                assert source[1] in before
                origin = rest.split()[1]
                # What a stage leaves there is made by one of its commands.
                made = " ".join(line for _, line in found[source[1]])
                assert origin in made, f"{stage}: {origin} of {source[1]}"


def test_each_image_runs_as_nobody_in_particular() -> None:
    """By number, so that Kubernetes can tell that it is not root; and the one that its manifests name."""
    for stage in ("cpu", "gpu"):
        assert [rest for name, rest in stages()[stage] if name == "USER"][-1] == "10001:10001"
    assert not any(name == "USER" for name, _ in stages()["demo"])


def test_what_it_runs_are_commands_of_tandem() -> None:
    steps = dict(stages()["cpu"])
    assert json.loads(steps["ENTRYPOINT"]) == ["tandem"]
    words = json.loads(steps["CMD"])
    asked = json.loads(steps["HEALTHCHECK"].partition("CMD ")[2])
    assert asked[0] == "tandem"
    for command in (words, asked[1:]):
        group = typer.main.get_command(app)
        found = group.get_command(group.make_context("tandem", command), command[0])  # type: ignore[attr-defined]
        found.make_context(command[0], command[1:])
    exposed = {int(port) for port in steps["EXPOSE"].split()}
    assert exposed == {50051, 50052, 50053, 8000}
