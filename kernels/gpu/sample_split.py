"""How the sampling kernels split a row of logits over programs, so that few rows fill a GPU, too."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.gpu.tuning import Config

# Counts to choose from: every kernel is compiled for each that turns up, and a power of two between them gains little.
COUNTS = (128, 32, 8, 1)
# About eight programs of 4 warps on each of an H200's 132 multiprocessors.
PROGRAMS_MAX = 1024
# Tokens of a program, at least: a multiple of every kernel's tile.
CHUNK_MIN = 1024
NUM_WARPS = 4


@dataclass(frozen=True, slots=True)
class Split:
    """Each of `count` programs, a power of two, takes one run of a row's tokens, a multiple of CHUNK_MIN long."""

    count: int

    def chunk(self, vocab: int) -> int:
        """The length of a run; the last ones may be shorter, or empty."""
        units = -(-vocab // CHUNK_MIN)
        return -(-units // self.count) * CHUNK_MIN


def candidates(rows: int, vocab: int) -> list[Config]:
    """Every count that leaves no program without tokens, the best guess for `rows` rows first."""
    counts = [count for count in COUNTS if count * CHUNK_MIN < 2 * vocab] or [1]
    guess = next((count for count in counts if rows * count <= PROGRAMS_MAX), 1)
    return [Config({"SPLITS": count}, NUM_WARPS) for count in sorted(counts, key=lambda count: count != guess)]
