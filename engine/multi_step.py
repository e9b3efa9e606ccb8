"""Several decode steps in one call, for runners that need nobody between two steps.

A decode step that nothing interrupts is followed by its like: the same rows, one token further. A runner that can feed
each row its own draw may run many of them in one go, and its worker books them all at once. What is computed, and when,
is the same as step by step: the worker calls `cut_short` for everything that would change the next batch.

For the runner on virtual time this means one event where there were hundreds. Runners of real devices do not offer it:
their clients are to see each token when it is there.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from engine.batch import Batch, Runner, StepOutput
from engine.sampling import SamplingParams


@runtime_checkable
class MultiStepRunner(Runner, Protocol):
    """A runner that can repeat a batch of decode rows. At most one `run_many` is under way, and no `run` beside it."""

    async def run_many(self, batch: Batch, max_steps: int) -> list[StepOutput]:
        """Runs `batch`, and again one token further, up to `max_steps` times; one output per step that was run.

        Every row has one token, draws one, and `can_repeat` holds for its parameters. Step i (from 0) computes
        position start + i of each row: the row's own token in step 0, after that what step i − 1 drew for it; it draws
        token number `sample.step` + i. `block_ids` covers [0, start + max_steps); step i uses the blocks of
        [0, start + i + 1) and none beyond: after `cut_short` those may become somebody else's. `batch.copies` run once,
        before step 0. Takes as long as `run` would take for the same batches one after another. What `Runner.run` says
        of errors and cancelling holds here too.
        """
        ...

    def cut_short(self) -> int:
        """The run under way ends after the step that runs now: as soon as `run_many` would have begun another one, it
        returns instead. Returns how many steps the run will then have had, at least 1, which is the length of its
        output. Calling it again, or after the last step has ended, changes nothing and returns the same."""
        ...


def can_repeat(params: SamplingParams) -> bool:
    """Whether a request's steps can be run without looking at what they draw: only its length ends it, and a draw
    depends on nothing but the context (no penalties) and the number of the draw."""
    is_ended_by_length = params.ignore_eos and not params.stop_token_ids and not params.stop
    return is_ended_by_length and not params.needs_history
