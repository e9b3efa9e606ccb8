"""A loop's clock that leaps and races: timers go by it, sockets by the world's."""

from __future__ import annotations

import asyncio
import time

from cluster.chaos.warped_loop import WarpedLoop


def on_warped_loop(main) -> None:
    with asyncio.Runner(loop_factory=WarpedLoop) as runner:
        runner.run(main())


def test_what_a_leap_passes_over_is_due_at_once() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, WarpedLoop)
        early, late = asyncio.create_task(asyncio.sleep(30)), asyncio.create_task(asyncio.sleep(60))
        await asyncio.sleep(0)
        before_s, real_s = loop.time(), time.monotonic()
        loop.warp(jump_s=40.0)
        await early
        assert loop.time() - before_s >= 40.0
        assert time.monotonic() - real_s < 5.0
        assert not late.done()
        late.cancel()

    on_warped_loop(main)


def test_at_another_rate_timers_fire_so_much_earlier_or_later() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, WarpedLoop)
        for rate, asleep_s in ((20.0, 4.0), (0.5, 0.1)):
            loop.warp(rate=rate)
            real_s = time.monotonic()
            await asyncio.sleep(asleep_s)
            assert asleep_s / rate * 0.99 <= time.monotonic() - real_s < asleep_s / rate + 1.0
        loop.warp()
        before_s, real_s = loop.time(), time.monotonic()
        await asyncio.sleep(0.1)
        assert abs((loop.time() - before_s) - (time.monotonic() - real_s)) < 0.01

    on_warped_loop(main)
