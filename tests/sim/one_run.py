"""One simulated world from its making to its last check."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from cluster.planning import virtual_loop
from tests.sim.world import World

SomeWorld = TypeVar("SomeWorld", bound=World)


def to_its_end(make: Callable[[], SomeWorld], case: str, tell: Callable[[SomeWorld], str]) -> SomeWorld:
    """Makes a world on a loop of its own, runs it and checks everything. Every failure says which `case` it was, and
    what `tell` has to say of its world."""
    world: SomeWorld | None = None

    async def run() -> None:
        nonlocal world
        world = make()
        await world.run()

    try:
        virtual_loop.run(run())
        assert world is not None
        world.check_clients()
    except BaseException as error:
        error.add_note(case)
        if world is not None:
            error.add_note(tell(world))
        raise
    return world
