"""The ranks of one worker: how they find each other, and what they say to each other.

    rank 0, the leader      opens a Rendezvous on a free port; gives its address to the others; runs the worker's loop
    every other rank        reaches that address, loads its share of the model, does as the leader says

Four groups, each with connections of its own, so that none waits behind another:

    control   leader → rank: the next batch. rank → leader: these layers are done          gloo
    blocks    leader ↔ rank: KV blocks that leave and enter the cache                      gloo
    tensor    sums between the ranks that share a pipeline stage                           gloo, or NCCL on GPUs
    pipe      hidden states from stage to stage, logits to the leader                      gloo, or NCCL on GPUs

A process that dies closes its connections, and whoever waits for it learns of it at once; one that hangs costs the
others at most `timeout_s`. Either way they raise RankLost, and the worker must be started again, all ranks of it.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event
from typing import Any, Protocol

import msgpack
import torch
import torch.distributed

from engine.errors import ConfigError

# One message between ranks that takes longer than this is lost. A stage waits for the one before it, so this is more
# than any step takes, kernels being compiled included.
TIMEOUT_S = 120.0
# Ranks load their shares side by side, so what one waits for another is the difference.
JOIN_TIMEOUT_S = 600.0
JOIN_POLL_S = 0.02
# A rank that waits for the leader's next word waits for as long as the leader has nothing to do.
FOREVER = timedelta(days=365)
# Nearly every message fits into one piece of this size; a longer one is followed by its rest.
MESSAGE_BYTES = 16 << 10
LENGTH_BYTES = 8

Message = dict[str, object]

# torch's stubs leave out most of what its backends and stores can do.
dist: Any = torch.distributed


class Work(Protocol):
    """Something under way on a connection."""

    def wait(self) -> bool: ...


class Backend(Protocol):
    """The part of torch's process groups that is used here: gloo's and NCCL's have it in common."""

    def allreduce(self, tensors: list[torch.Tensor]) -> Work: ...

    def broadcast(self, tensor: torch.Tensor, root: int) -> Work: ...

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Work: ...

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work: ...


class RankLost(Exception):
    """Another rank of this worker died, hangs, or is out of step. Not a TandemError: only starting again helps."""


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a worker, and the address of this machine under which the other ranks reach it."""

    rank: int
    tensor_parallel: int
    pipeline_parallel: int
    host: str = "127.0.0.1"

    @property
    def size(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def stage(self) -> int:
        return self.rank // self.tensor_parallel

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor_parallel


class Rendezvous:
    """Where the ranks of one worker find each other: a key-value store in the leader's process."""

    def __init__(self, store: Any, address: str) -> None:  # noqa: ANN401 - see above
        self.address = address
        self.store = store
        self._abandoned = Event()

    @classmethod
    def open(cls, host: str = "127.0.0.1") -> Rendezvous:
        """Listens on a free port of `host`, and on no other address of this machine."""
        family, _, _, _, where = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(where)
        listener.listen()
        port = listener.getsockname()[1]
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), timeout=_timeout()
        )
        return cls(store, f"{host}:{port}")

    @classmethod
    def reach(cls, address: str) -> Rendezvous:
        """Connects to the leader's. Raises RankLost."""
        host, _, port = address.rpartition(":")
        with _losses():
            return cls(dist.TCPStore(host, int(port), is_master=False, timeout=_timeout()), address)

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0]

    def fail(self, rank: int, problem: str) -> None:
        """Tells the leader, in one line, why this rank can never join."""
        with _losses():
            self.store.set(f"problem-{rank}", problem)

    def problem(self, rank: int) -> str:
        """What a rank that failed has said, else ""."""
        key = f"problem-{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def abandon(self) -> None:
        """Ends a `meet` under way in another thread: a rank has died."""
        self._abandoned.set()

    def meet(self, member: Member, identity: str) -> None:
        """Waits for all ranks. `identity` names what they must have in common: the model, the number of blocks.

        Raises ConfigError with the problem of a rank that failed, and RankLost when one does not come.
        """
        with _losses():
            self.store.set(f"identity-{member.rank}", identity)
            for rank in range(member.size):
                self._wait_for(rank)
                theirs = self.store.get(f"identity-{rank}").decode()
                if theirs != identity:
                    raise ConfigError(f"ranks of one worker differ: rank {member.rank} has {identity}, {rank} {theirs}")

    def _wait_for(self, rank: int) -> None:
        give_up_at = time.monotonic() + JOIN_TIMEOUT_S
        while not self.store.check([f"identity-{rank}"]):
            if problem := self.problem(rank):
                raise ConfigError(f"rank {rank}: {problem}")
            if self._abandoned.is_set() or time.monotonic() > give_up_at:
                raise RankLost(f"rank {rank} did not join")
            time.sleep(JOIN_POLL_S)


class Group:
    """Some ranks with connections of their own. Ranks are numbered within the group, and call in the same order."""

    def __init__(self, backend: Backend) -> None:
        self._backend: Backend | None = backend

    def all_reduce(self, x: torch.Tensor) -> None:
        """Replaces x by its sum over all ranks, the same bits on each. x is contiguous."""
        with _losses():
            self._open.allreduce([x]).wait()

    def broadcast(self, x: torch.Tensor) -> None:
        """Replaces x by what rank 0 has."""
        with _losses():
            self._open.broadcast(x, 0).wait()

    def send(self, x: torch.Tensor, to: int) -> None:
        with _losses():
            self._open.send([x], to, 0).wait()

    def receive(self, x: torch.Tensor, source: int) -> None:
        """Fills x, whose shape and dtype must be the sender's."""
        with _losses():
            self._open.recv([x], source, 0).wait()

    def close(self) -> None:
        """Closes the connections: not the object alone, which an error's traceback may keep alive."""
        self._backend = None

    @property
    def _open(self) -> Backend:
        if self._backend is None:
            raise RankLost("the connections to the other ranks are closed")
        return self._backend

    def send_message(self, message: Message, to: int) -> None:
        """msgpack, so that what arrives can only be plain values."""
        raw = msgpack.packb(message)
        size = max(MESSAGE_BYTES, LENGTH_BYTES + len(raw))
        buffer = bytearray(len(raw).to_bytes(LENGTH_BYTES, "little") + raw).ljust(size, b"\0")
        pieces = torch.frombuffer(buffer, dtype=torch.uint8)
        self.send(pieces[:MESSAGE_BYTES], to)
        if size > MESSAGE_BYTES:
            self.send(pieces[MESSAGE_BYTES:], to)

    def receive_message(self, source: int) -> Message:
        piece = torch.empty(MESSAGE_BYTES, dtype=torch.uint8)
        self.receive(piece, source)
        length = int.from_bytes(piece[:LENGTH_BYTES].numpy().tobytes(), "little")
        missing = LENGTH_BYTES + length - MESSAGE_BYTES
        if missing > 0:
            rest = torch.empty(missing, dtype=torch.uint8)
            self.receive(rest, source)
            piece = torch.cat((piece, rest))
        message: Message = msgpack.unpackb(piece[LENGTH_BYTES : LENGTH_BYTES + length].numpy().tobytes())
        return message


class Ranks:
    """All groups of one rank. Nothing can be said before `join`."""

    control: Group
    blocks: Group
    pipe: Group
    tensor: Group

    def __init__(self, member: Member, rendezvous: Rendezvous, timeout_s: float = TIMEOUT_S) -> None:
        self.member = member
        self._rendezvous = rendezvous
        self._timeout = timedelta(seconds=timeout_s)
        self._groups: list[Group] = []

    def join(self, identity: str, device: torch.device) -> None:
        """Waits for all ranks, then connects. Raises what `Rendezvous.meet` raises."""
        member = self.member
        self._rendezvous.meet(member, identity)
        # Only the leader expects an answer in time; to the others its silence means that there is nothing to do.
        patience = self._timeout if member.rank == 0 else FOREVER
        on_gpu = device.type == "cuda"
        with _losses():
            self.control = self._gloo("control", member.rank, member.size, patience)
            self.blocks = self._gloo("blocks", member.rank, member.size, patience)
            connect = self._nccl if on_gpu else self._gloo
            self.pipe = connect("pipe", member.rank, member.size, self._timeout)
            self.tensor = connect(f"tensor-{member.stage}", member.tensor_rank, member.tensor_parallel, self._timeout)

    def _gloo(self, name: str, rank: int, size: int, timeout: timedelta) -> Group:
        options = dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._threads = 1
        # By address: the default would look this machine's name up.
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=self.member.host)]
        store = dist.PrefixStore(name, self._rendezvous.store)
        return Group(dist.ProcessGroupGloo(store, rank, size, options))

    def _nccl(self, name: str, rank: int, size: int, timeout: timedelta) -> Group:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        store = dist.PrefixStore(name, self._rendezvous.store)
        return Group(dist.ProcessGroupNCCL(store, rank, size, options))

    def close(self) -> None:
        """Closes all connections; whoever still waits for this rank gets RankLost."""
        for group in self._groups:
            group.close()


@contextmanager
def _losses() -> Iterator[None]:
    """torch's errors of connections and timeouts as one."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise RankLost(f"another rank of this worker is lost: {str(error).splitlines()[0]}") from error


def _timeout() -> timedelta:
    return timedelta(seconds=TIMEOUT_S)
