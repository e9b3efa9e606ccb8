"""Calls of the C++ library, written down while they are made, and made again by one call: no Python between kernels.

What a recorded call reads and writes are addresses, so a replay computes on the very memory of the recording. Results
that nobody holds any more give their memory to later ones, while recording as while replaying; so one recording needs
little more memory than one layer, and all recordings share it: they never run at the same time.

Only calls of the library are written down. What they read that is no call's result (weights, the cache, a step's
inputs) must outlive the recording, and is read where it lay. An operation that goes another way says so
(`not_recordable`), and the recording is refused.
"""

from __future__ import annotations

import ctypes
import math
import sys
import threading
from collections.abc import Callable

import numpy as np
import torch

from kernels.capture import NotRecordable, Result
from kernels.cpu.library import Library

ALIGNMENT = 64
# What sys.getrefcount says of an array that only `_Memory` holds: its list's reference, and the argument's.
IDLE_REFERENCES = 2


class _Call(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("args", ctypes.c_void_p))


class _ReplayArgs(ctypes.Structure):
    _fields_ = (("calls", ctypes.c_void_p), ("count", ctypes.c_int64))


class _Memory:
    """Arrays that tensors live in. An array is free again when no tensor refers to it: numpy counts."""

    def __init__(self) -> None:
        self._arrays: list[np.ndarray[tuple[int], np.dtype[np.uint8]]] = []

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        wanted = math.prod(shape) * dtype.itemsize
        array = self._free(wanted)
        start = -array.ctypes.data % ALIGNMENT
        return torch.from_numpy(array[start : start + wanted]).view(dtype).view(shape)

    def _free(self, wanted: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """The smallest idle array that is large enough, or a new one."""
        idle = [
            index
            for index in range(len(self._arrays))
            if self._arrays[index].nbytes >= wanted + ALIGNMENT
            and sys.getrefcount(self._arrays[index]) == IDLE_REFERENCES
        ]
        if idle:
            return self._arrays[min(idle, key=lambda index: self._arrays[index].nbytes)]
        self._arrays.append(np.empty(wanted + ALIGNMENT, dtype=np.uint8))
        return self._arrays[-1]


class _Recording(threading.local):
    """What this thread is recording, if anything."""

    memory: _Memory | None = None
    problem: str | None = None


_recording = _Recording()


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Uninitialised memory for a result, which a recording keeps for its replays."""
    memory = _recording.memory
    return torch.empty(shape, dtype=dtype) if memory is None else memory.empty(shape, dtype)


def not_recordable(what: str) -> None:
    """To be called by whatever computes without the library."""
    _recording.problem = what


class CallRecorder:
    """A `Capture` of calls of the library."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._replay = library.function("tandem_replay")
        self._memory = _Memory()

    def __call__(self, work: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        _recording.memory, _recording.problem = self._memory, None
        try:
            with self._library.recording() as calls:
                result = work()
        finally:
            _recording.memory = None
        if _recording.problem is not None:
            raise NotRecordable(_recording.problem)
        entries = [_Call(_address(function), ctypes.addressof(args)) for function, args in calls]
        table = (_Call * len(calls))(*entries)
        args = _ReplayArgs(ctypes.addressof(table), len(calls))

        def replay() -> None:
            # `calls` and `table` are named so that they live as long as this does.
            assert len(calls) == len(table)
            self._library.call(self._replay, args)

        return replay, _unowned(result)


def _address(function: ctypes._NamedFuncPointer) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def _unowned(result: Result) -> Result:
    """The same tensors over the same memory, but without keeping it from others."""
    if isinstance(result, torch.Tensor):
        assert result.is_contiguous(), "what a recording gives is contiguous"
        raw = (ctypes.c_char * (result.numel() * result.itemsize)).from_address(result.data_ptr())
        same: Result = torch.frombuffer(raw, dtype=result.dtype).view(result.shape)  # type: ignore[assignment]
        return same
    if isinstance(result, tuple):
        return tuple(_unowned(part) for part in result)  # type: ignore[return-value]
    return result
