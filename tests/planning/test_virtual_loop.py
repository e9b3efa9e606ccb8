"""The virtual loop: time jumps, order is kept, nothing real gets in, and waiting for nothing is an error."""

import asyncio
import socket
import threading
import time

import pytest

from cluster.planning import virtual_loop
from cluster.planning.virtual_loop import Deadlock


def test_a_day_of_sleep_takes_no_time():
    async def main():
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    assert virtual_loop.run(main()) == 86_400
    assert time.monotonic() - began < 1


@pytest.mark.parametrize("start", [0.0, 1e-3, 1.7e9, 1e15])
def test_timers_fire_exactly_when_due_however_large_the_time(start):
    async def main():
        loop = asyncio.get_running_loop()
        fired = []
        for delay_s in (3.5, 0.25, 2.0, 0.25, 0.0):
            loop.call_at(start + delay_s, lambda due_s=start + delay_s: fired.append((due_s, loop.time())))
        await asyncio.sleep(10)
        return fired

    fired = virtual_loop.run(main(), start=start)
    assert fired == [(start + delay_s,) * 2 for delay_s in (0.0, 0.25, 0.25, 2.0, 3.5)]


def test_timeouts_measure_virtual_time():
    async def main():
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5):
                await asyncio.sleep(6)
        return loop.time()

    assert virtual_loop.run(main(), start=100) == 105


def test_waiting_for_nothing_names_who_waits_and_where():
    async def stuck_reader():
        await asyncio.Event().wait()

    async def main():
        task = asyncio.create_task(stuck_reader(), name="reader of nothing")
        await asyncio.sleep(1.5)
        await task

    with pytest.raises(Deadlock) as caught:
        virtual_loop.run(main())
    text = str(caught.value)
    assert "deadlock at virtual time 1.500000 s" in text
    assert "reader of nothing: " in text
    assert "stuck_reader (test_virtual_loop.py:" in text
    assert "Event.wait (locks.py:" in text
    assert "task-1: " in text, "the main task waits as well"


def test_leftover_tasks_are_cancelled_and_generators_closed():
    seen = []

    async def generator():
        try:
            yield 1
            yield 2
        finally:
            await asyncio.sleep(1)
            seen.append("generator closed")

    async def forever():
        try:
            await asyncio.sleep(1e9)
        finally:
            seen.append("task cancelled")

    async def main():
        task = asyncio.create_task(forever())
        iterator = generator()
        await anext(iterator)
        seen.append("main done")
        return task, iterator

    virtual_loop.run(main())
    assert seen == ["main done", "task cancelled", "generator closed"]


def test_errors_come_out_as_they_are():
    async def main():
        await asyncio.sleep(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        virtual_loop.run(main())


def test_what_a_callback_raises_ends_the_run():
    def fail():
        raise KeyError("mine")

    async def main():
        asyncio.get_running_loop().call_later(1, fail)
        await asyncio.sleep(5)

    with pytest.raises(KeyError, match="mine"):
        virtual_loop.run(main())


def test_callbacks_are_counted_and_cancelled_timers_are_not():
    async def main():
        loop = asyncio.get_running_loop()
        before = loop.events
        for delay_s in range(1, 4):
            loop.call_later(delay_s, lambda: None)
        for _ in range(1000):
            loop.call_later(2, lambda: None).cancel()
        await asyncio.sleep(10)
        # Three timers, the sleep's own, and this task going on.
        return loop.events - before, len(loop._timers)

    assert virtual_loop.run(main()) == (5, 0)


def test_timers_of_one_moment_fire_in_the_order_in_which_they_were_set():
    async def main():
        loop = asyncio.get_running_loop()
        order = []
        for number in range(100):
            loop.call_at(1.0, order.append, number)
        await asyncio.sleep(2)
        return order

    assert virtual_loop.run(main()) == list(range(100))


def test_sockets_are_refused():
    async def main():
        asyncio.get_running_loop().add_reader(ours, print)

    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(RuntimeError, match="no real I/O in virtual time"):
        virtual_loop.run(main())


def test_executors_are_refused():
    async def main():
        await asyncio.to_thread(time.sleep, 0)

    with pytest.raises(RuntimeError, match=r"no threads in virtual time: run_in_executor"):
        virtual_loop.run(main())


def test_other_threads_are_refused():
    errors = []

    async def main():
        loop = asyncio.get_running_loop()

        def intrude():
            try:
                loop.call_soon_threadsafe(print)
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    virtual_loop.run(main())
    assert errors == ["no threads in virtual time: another thread called into the virtual loop"]


def test_task_groups_cancel_in_order_of_creation_in_every_run():
    async def main():
        order = []

        async def wait(number):
            try:
                await asyncio.sleep(100)
            finally:
                order.append(number)

        async def fail_later():
            async with asyncio.TaskGroup() as group:
                for number in range(50):
                    group.create_task(wait(number))
                await asyncio.sleep(1)
                raise ValueError

        with pytest.raises(ExceptionGroup):
            await fail_later()
        return order

    # asyncio keeps a group's tasks in a set; by address their order would change from run to run.
    assert virtual_loop.run(main()) == list(range(50))


def test_a_running_loop_is_not_nested():
    async def main():
        coroutine = asyncio.sleep(0)
        try:
            virtual_loop.run(coroutine)
        finally:
            coroutine.close()

    with pytest.raises(RuntimeError, match="inside a running event loop"):
        virtual_loop.run(main())
