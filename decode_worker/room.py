"""Who gets blocks, of those who wait for them: whoever came first, be its prompt pulled or computed here.

    pulls that have begun ───┐ whose turn it is, as soon as there is room for all that it needs
    prompts computed here ───┘

Else small newcomers of one kind could keep a large request of the other kind waiting for ever. Only whose client reads
already (preempted, or of a worker that was lost) passes a pull that came before: such are few, and no more come while
that waits. A pull whose prefill worker has not begun waits for no blocks, and holds up nobody.
"""

from __future__ import annotations

from decode_worker.flight import Flight
from decode_worker.local_prompts import LocalPrompts
from decode_worker.pulls import Pulls
from decode_worker.running import Running
from decode_worker.sequence import Choice, Request
from engine.block_pool import BlockPool


class Room:
    """The blocks that running choices leave to newcomers."""

    def __init__(self, pool: BlockPool, pulls: Pulls, local: LocalPrompts, running: Running, flight: Flight) -> None:
        self._pool = pool
        self._pulls = pulls
        self._local = local
        self._running = running
        self._flight = flight

    def admit(self, now: float) -> None:
        """Gives blocks to those whose prompts are computed here. Only where no step under way may name what is free."""
        self._local.admit(self._may_start, now)

    def grant(self, now: float) -> list[Request]:
        """Gives blocks to pulls; returns who may read on."""
        return self._pulls.grant(lambda request, missing: self._may_receive(request, missing, now))

    def is_stuck(self, now: float) -> bool:
        """True when somebody waits for blocks, nobody can have them, and nobody is going to give any back. Ask after
        `admit`."""
        if self._running or self._local.computing or self._flight.is_anybody_leaving or self._pulls.is_receiving:
            return False
        pull = self._oldest_pull()
        if pull is not None and self._may_receive(pull, self._pulls.missing(pull), now):
            return False
        return pull is not None or self._local.is_anybody_waiting

    def demote(self, now: float) -> Request | None:
        """When all are stuck: takes the youngest puller out, but for the one whose turn it is, and back the prefix that
        it has pinned. None where nobody has pinned any."""
        pull, choice = self._oldest_pull(), self._local.next(now)
        if pull is None or (choice is not None and choice.request.serial < pull.serial):
            assert choice is not None, "nobody waits for blocks"
            pull = choice.request
        return self._pulls.demote(pull)

    def _oldest_pull(self) -> Request | None:
        return next(iter(self._pulls.reserving()), None)

    def _may_start(self, choice: Choice, missing: int) -> bool:
        pull = self._oldest_pull()
        is_turn = pull is None or choice.request.serial < pull.serial or choice.request.is_read
        return is_turn and self._fits(self._pool.blocks_for(missing))

    def _may_receive(self, request: Request, missing: int, now: float) -> bool:
        """Where there is room for one that came before as well, it need not have its blocks first: that would take
        until the next step."""
        blocks = self._pool.blocks_for(missing)
        choice = self._local.next(now)
        if choice is not None and choice.request.serial < request.serial:
            blocks += self._pool.blocks_for(len(choice.token_ids))
        return self._fits(blocks)

    def _fits(self, blocks: int) -> bool:
        """Room for a newcomer: what it needs, and a block for each running choice, lest they preempt it at once."""
        return blocks + len(self._running) <= self._pool.available_count
