"""Machines that `ray up` can log in to: namespaces of processes, mounts and network, each with an sshd of its own.

    operator 10.77.7.1 ══ bridge ══ 10.77.7.2, 10.77.7.3, …        nothing else can be reached

Call from a process in namespaces of its own (`alone`): everything here ends with it, whatever becomes of it. A machine
sees no processes but its own, so that `ray stop` ends no other Ray.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

NETWORK = "10.77.7"
OPERATOR = f"{NETWORK}.1"
# A tmpfs of these namespaces: what is bound into it has the same path on all machines.
RUN = Path("/run")
FOLDER, WHEELS, HOME = RUN / "folder", RUN / "wheels", RUN / "home"
SSHD = "/usr/sbin/sshd"
TOOLS = ("git", "ip", "unshare", "setpriv", "mount", "rsync", "ssh", "ssh-keygen", SSHD)

SSHD_CONFIG = """
HostKey {disk}/host_key
AuthorizedKeysFile {disk}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
"""
# A machine's first process. The shell takes in what daemons leave behind.
BOOT = f"""
set -e
hostname "$1"
mount --bind "$2/home" {HOME}
for file in passwd hosts resolv.conf; do mount --bind "$2/$file" "/etc/$file"; done
mount -t tmpfs tmpfs /dev/shm
mount --bind "$2/tmp" /tmp
{SSHD} -D -f "$2/sshd_config" -E "$2/sshd.log" &
wait
"""


def alone(*command: str) -> list[str]:
    """`command` in namespaces of its own; what it starts ends with it, and it with who started it."""
    spaces = ["--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    return ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, *command]


def sh(*command: str | Path) -> str:
    """What the command wrote. Raises CalledProcessError."""
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def prepare(folder: Path, wheels: Path) -> None:
    """Lays the network; binds `folder`, where the machines have their disks, and `wheels`, which they install from."""
    sh("mount", "--make-rprivate", "/")
    sh("mount", "-t", "tmpfs", "tmpfs", RUN)
    for name in ("sshd", "netns", "home", "folder", "wheels"):
        (RUN / name).mkdir()
    sh("mount", "--bind", folder, FOLDER)
    sh("mount", "--bind", wheels, WHEELS)
    sh("ip", "link", "set", "lo", "up")
    sh("ip", "link", "add", "name", "switch", "type", "bridge")
    sh("ip", "address", "add", f"{OPERATOR}/24", "dev", "switch")
    sh("ip", "link", "set", "switch", "up")


def boot(name: str, number: int, authorized_key: Path, profile: str) -> str:
    """Starts a machine and returns its address. `authorized_key` lets root in, whose ~/.bashrc is `profile`."""
    address, disk = f"{NETWORK}.{number}", FOLDER / name
    for part in ("home", "tmp"):
        (disk / part).mkdir(parents=True, exist_ok=True)
    (disk / "home" / ".bashrc").write_text(profile)
    (disk / "authorized_keys").write_bytes(authorized_key.read_bytes())
    (disk / "sshd_config").write_text(SSHD_CONFIG.format(disk=disk))
    passwd(disk / "passwd", HOME)
    (disk / "hosts").write_text(f"127.0.0.1 localhost\n{address} {name}\n")
    # Nobody answers there, and says so at once.
    (disk / "resolv.conf").write_text("nameserver 127.0.0.1\n")
    sh("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", disk / "host_key")
    sh("ip", "netns", "add", name)
    sh("ip", "link", "add", "dev", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
    sh("ip", "link", "set", f"to-{name}", "master", "switch", "up")
    for arguments in (
        ("address", "add", f"{address}/24", "dev", "eth0"),
        ("link", "set", "eth0", "up"),
        ("link", "set", "lo", "up"),
        # Leads nowhere, but Ray finds a node's own address by it.
        ("route", "add", "default", "via", OPERATOR),
    ):
        sh("ip", "-n", name, *arguments)
    own = ["unshare", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child", "--mount-proc"]
    subprocess.Popen(["ip", "netns", "exec", name, *own, "bash", "-c", BOOT, "boot", name, str(disk)])
    return address


def passwd(file: Path, home: Path) -> None:
    """Writes /etc/passwd anew, with another home for root."""
    lines = Path("/etc/passwd").read_text()
    file.write_text(re.sub(r"^root:.*$", f"root:x:0:0::{home}:/bin/bash", lines, flags=re.MULTILINE))
