"""Everything that can go wrong in the world, as one tree.

    TandemError
    ├── InvalidArgument     a field of a request is wrong: names the field, the value and what would be right
    │   └── ContextExceeded the prompt, or with it the answer asked for, is longer than the model's context
    ├── Unauthenticated     nobody knows who is calling: no key or token, or none that counts
    ├── PermissionDenied    the caller may not do this
    ├── NotFound            a named thing (model, worker, request) does not exist
    ├── Overloaded          a bounded queue or pool is full: carries a reason and a retry-after
    ├── DeadlineExceeded    the request's own deadline passed, in a named phase
    ├── Cancelled           the other side asked to stop
    ├── Unavailable         a peer is gone, draining or not there yet
    │   └── HandedBack      a worker that drains gives the request back: another one may go on with it
    ├── TransferFailed      KV did not arrive whole
    │   ├── CorruptFrame    a frame failed its checksum or cannot be parsed
    │   └── LayoutMismatch  the two sides do not hold the same kind of KV
    ├── VersionMismatch     two parts of different releases have no version of their protocol in common
    ├── ModelFileError      a model file is missing, truncated, corrupt or of an unknown kind
    └── ConfigError         a configuration value, flag or port cannot be used

Bugs are not in this tree: they are `assert`s. `kvtransfer/rpc.py` is the only place where these become gRPC statuses.
"""

from __future__ import annotations


class TandemError(Exception):
    """Base of the tree. `str(error)` is one line, fit for a user. `is_of_prefill`: a prompt's KV did not come to a
    decode worker, which itself stands."""

    is_of_prefill = False


class InvalidArgument(TandemError):
    """A field of a request is wrong."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        shown = repr(value)
        if len(shown) > 80:
            shown = shown[:77] + "..."
        super().__init__(f"{field}: got {shown}, expected {expected}")
        self.field = field
        self.value = shown
        self.expected = expected

    def rename(self, field: str) -> None:
        """For callers who know the field by another name."""
        self.field = field
        self.args = (f"{field}: got {self.value}, expected {self.expected}",)


class ContextExceeded(InvalidArgument):
    """The prompt, or with it the answer asked for, is longer than the model's context. Told apart on this side of the
    wire only, where OpenAI's clients have a code for it."""


class Unauthenticated(TandemError):
    """Nobody knows who is calling. The text is for the caller and helps nobody to guess; `detail` says for this side's
    log what was wrong, holds nothing secret, and is never sent."""

    detail = ""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.detail = detail


class PermissionDenied(TandemError):
    """The caller may not do this. The message helps an honest caller, and nobody who guesses."""


class NotFound(TandemError):
    """A named thing does not exist."""

    def __init__(self, kind: str, name: str, known: str = "") -> None:
        super().__init__(f"{kind} {name!r} not found" + (f"; known: {known}" if known else ""))


class Overloaded(TandemError):
    """A bounded queue or pool is full."""

    def __init__(self, reason: str, retry_after_s: float = 1.0) -> None:
        super().__init__(f"{reason}; retry after {retry_after_s:g} s")
        self.reason = reason
        self.retry_after_s = retry_after_s


class DeadlineExceeded(TandemError):
    """The request's deadline passed."""

    def __init__(self, phase: str) -> None:
        super().__init__(f"deadline exceeded during {phase}")
        self.phase = phase


class Cancelled(TandemError):
    """The other side asked to stop."""


class Unavailable(TandemError):
    """A peer is gone, draining or not there yet."""


class HandedBack(Unavailable):
    """A worker that drains gives the request back: another one may go on with it, and nothing is lost."""


class TransferFailed(TandemError):
    """KV did not arrive whole."""


class CorruptFrame(TransferFailed):
    """A frame failed its checksum or cannot be parsed."""


class LayoutMismatch(TransferFailed):
    """The two sides do not hold the same kind of KV."""


class VersionMismatch(TandemError):
    """Two parts of different releases have no version of their protocol in common."""


class ModelFileError(TandemError):
    """A model file cannot be used."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(f"{path}: {problem}")


class ConfigError(TandemError):
    """A configuration value, flag or port cannot be used."""
