"""Builds all C++ of this folder into one shared library, and loads it.

    python -m kernels.cpu.library              builds it, as an installation should; otherwise the first use does
    python -m kernels.cpu.library --portable   builds one for images: it serves every CPU that can have one, and who
                                               finds it needs no compiler and no folder to write in

The file's name carries a hash of sources and flags, and of compiler and CPU where it is for one, so one that exists is
never stale. Every function takes one pointer to a plain struct: a call is two addresses, which can be kept and made
again.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

COMMON_FLAGS = ("-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-exceptions", "-fno-math-errno")
FLAGS = ("-O3", "-march=native", *COMMON_FLAGS)

# What every kernel may use without asking: AMD since Zen 4, Intel since Cooper Lake and Sapphire Rapids.
CPU_FLAGS = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "fma", "f16c"})
# The same as g++ names them, and what comes with them.
PORTABLE_FLAGS = ("-O3", "-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", *COMMON_FLAGS)

_SOURCES = Path(__file__).parent
_BUILD = _SOURCES / "build"


class Unavailable(Exception):
    """Says why this machine has no library."""


# A function and what it was called with.
Call = tuple["ctypes._NamedFuncPointer", ctypes.Structure]


class _Recorded(threading.local):
    calls: list[Call] | None = None


class Library:
    """The loaded library. Calls release the GIL, and calls from several threads take turns."""

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))
        self._recorded = _Recorded()
        self._dll.tandem_set_threads.argtypes = [ctypes.c_int]
        self._dll.tandem_set_threads.restype = None
        self._dll.tandem_threads.argtypes = []
        self._dll.tandem_threads.restype = ctypes.c_int
        self._dll.tandem_pin.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_int]
        self._dll.tandem_pin.restype = ctypes.c_int
        self.set_threads(len(os.sched_getaffinity(0)))

    def function(self, name: str) -> ctypes._NamedFuncPointer:
        """The function `void name(const Args*)`."""
        function: ctypes._NamedFuncPointer = self._dll[name]
        function.argtypes = [ctypes.c_void_p]
        function.restype = None
        return function

    def call(self, function: ctypes._NamedFuncPointer, args: ctypes.Structure) -> None:
        """All kernels are called through here. What `args` points to must live until this returns."""
        function(ctypes.byref(args))
        if self._recorded.calls is not None:
            self._recorded.calls.append((function, args))

    @contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Collects the calls that this thread makes meanwhile."""
        assert self._recorded.calls is None, "this thread is recording already"
        calls = self._recorded.calls = []
        try:
            yield calls
        finally:
            self._recorded.calls = None

    def set_threads(self, count: int) -> None:
        """How many threads share each call from now on, the caller included."""
        self._dll.tandem_set_threads(count)

    def threads(self) -> int:
        return int(self._dll.tandem_threads())

    def pin(self, cpus: Sequence[int]) -> None:
        """Binds the calling thread to the first CPU, the pool's others to the next ones, round and round.

        Raises:
            OSError: the process may not run on such a CPU.
        """
        error = self._dll.tandem_pin((ctypes.c_int * len(cpus))(*cpus), len(cpus))
        if error:
            raise OSError(error, f"cannot bind threads to CPUs {list(cpus)}: {os.strerror(error)}")


@functools.cache
def load() -> Library | None:
    """The library, built first if need be. None, with one warning that says why, where this machine cannot have it."""
    try:
        return Library(build())
    except (Unavailable, OSError) as error:
        logger.warning("no C++ kernels, plain torch computes instead: %s", error)
        return None


def build() -> Path:
    """Compiles what is not compiled yet. Returns the library's path. Processes that want it at once wait for one.

    Raises:
        Unavailable: wrong system or CPU, no compiler, or the compiler failed.
        OSError: the folder cannot be written.
    """
    cpu = _cpu()
    if (portable := _portable()).exists():
        return portable
    compiler = _compiler()
    return _built(compiler, FLAGS, _BUILD / f"libtandem-{_fingerprint(FLAGS, _version(compiler), cpu)}.so")


def build_portable() -> Path:
    """As `build`, for CPUs that this machine's need not be one of."""
    return _built(_compiler(), PORTABLE_FLAGS, _portable())


def _portable() -> Path:
    return _BUILD / f"libtandem-portable-{_fingerprint(PORTABLE_FLAGS)}.so"


def _built(compiler: str, flags: Sequence[str], path: Path) -> Path:
    if path.exists():
        return path
    _BUILD.mkdir(exist_ok=True)
    (_BUILD / ".gitignore").write_text("*\n")
    with open(_BUILD / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _compile(compiler, flags, path)
    return path


def _compiler() -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        raise Unavailable("there is no g++")
    return compiler


def _compile(compiler: str, flags: Sequence[str], path: Path) -> None:
    sources = sorted(str(source) for source in _SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=_BUILD) as folder:
        unfinished = Path(folder) / path.name
        result = subprocess.run(
            [compiler, *flags, "-o", str(unfinished), *sources], capture_output=True, text=True, check=False
        )
        if result.returncode != 0:
            raise Unavailable(f"g++ failed: {result.stderr.strip()[-2000:]}")
        os.replace(unfinished, path)


def _cpu() -> str:
    """Model and features, as the kernel names them."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise Unavailable(f"they need Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    fields = {}
    for line in Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    missing = CPU_FLAGS - set(fields.get("flags", "").split())
    if missing:
        raise Unavailable(f"this CPU lacks {', '.join(sorted(missing))}")
    return f"{fields.get('model name', '')} {fields['flags']}"


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _fingerprint(flags: Sequence[str], *further: str) -> str:
    digest = hashlib.sha256("\0".join([*flags, *further]).encode())
    for source in sorted([*_SOURCES.glob("*.cpp"), *_SOURCES.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        print(f"C++ kernels: {build_portable() if '--portable' in sys.argv[1:] else build()}")
    except (Unavailable, OSError) as error:
        print(f"no C++ kernels here, plain torch computes instead: {error}")
