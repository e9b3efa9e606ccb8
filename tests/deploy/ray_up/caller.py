"""Who calls `ray up`: a home with a checkout, a key, a token and an edited cluster.yaml, as docs/ray.md tells."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.deploy.ray_up.machines import FOLDER, WHEELS, boot, passwd, sh

ROOT = Path(__file__).parents[3]
RAY = str(Path(sys.executable).with_name("ray"))
# Part of the path where Ray's launcher keeps its ssh sessions.
LOGIN = "tandem-ray-up"


def settle() -> Path:
    """Gives this process a home of its own, so that nothing of the user's is read or written."""
    home = FOLDER / "caller"
    (home / "tmp").mkdir(parents=True)
    (home / ".ssh").mkdir()
    # ssh takes the home from there, whatever HOME says.
    passwd(home / "passwd", home)
    sh("mount", "--bind", home / "passwd", "/etc/passwd")
    os.environ.update(HOME=str(home), TMPDIR=str(home / "tmp"), LOGNAME=LOGIN)
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / ".ssh" / "cluster")
    files = sh("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard")
    subprocess.run(["rsync", "-a", "--files-from=-", ROOT, home / "tandem"], input=files, text=True, check=True)
    return home


def machines(home: Path, pools: Mapping[str, str], model: Path) -> dict[str, str]:
    """Machines that have what docs/ray.md asks for: Python, labels, and the model; their addresses by name."""
    profile = f"export PATH={sys.base_prefix}/bin:$PATH PIP_NO_INDEX=1 PIP_FIND_LINKS={WHEELS}\n"
    addresses = {}
    for number, (name, pool) in enumerate(pools.items(), 2):
        addresses[name] = boot(name, number, home / ".ssh" / "cluster.pub", profile)
        at = FOLDER / name / "home"
        (at / "ray-labels.yaml").write_text(f"pool: {pool}\n")
        models = at / ".cache" / "tandem" / "models"
        models.mkdir(parents=True)
        shutil.copy(model, models)
    return addresses


def edited(file: Path, values: Mapping[str, str]) -> Path:
    """A copy of `file` beside the checkout, with other values on the lines that say EDIT."""
    lines = []
    unused = set(values)
    for line in file.read_text().splitlines(keepends=True):
        for value in values:
            if "EDIT" in line and value in line:
                line = line.replace(value, values[value])
                unused.discard(value)
        lines.append(line)
    assert not unused, f"{file} has no line to edit with {unused}"
    copy = Path.home() / file.name
    copy.write_text("".join(lines))
    return copy


def ray(*arguments: str) -> str:
    """What one of Ray's commands writes, which this process writes as well."""
    print(f"$ ray {shlex.join(arguments)}", flush=True)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen([RAY, *arguments], text=True, **pipes) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    assert process.returncode == 0, f"ray {shlex.join(arguments)}: exit code {process.returncode}"
    return "".join(lines)
