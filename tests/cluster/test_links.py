"""Links to decode workers: one stream each, events to the right request, cancels that are never lost."""

from __future__ import annotations

import asyncio

import pytest

from cluster.links import DecodeLinks
from decode_worker.stream import Delta, Done, Event, Failed, Submit
from engine.batch import Sampled
from engine.errors import Unavailable
from engine.sampling import SamplingParams
from tests.cluster.fake_decode import STEP_S, FakeDecode, on_virtual_time


def submit(request_id: str = "r", max_tokens: int = 3) -> Submit:
    return Submit(request_id, (1, 2), SamplingParams(max_tokens=max_tokens), seed=0)


async def read(links: DecodeLinks, address: str, command: Submit) -> list[Event]:
    async with links.submit(address, command) as events:
        return [event async for event in events]


def tokens_of(events: list[Event]) -> list[int]:
    return [token.token_id for event in events if isinstance(event, Delta) for token in event.tokens]


@on_virtual_time
async def test_two_requests_share_one_stream_and_get_their_own_events() -> None:
    fake = FakeDecode(answer=(7, 8, 9))
    links = DecodeLinks(fake)
    first, second = await asyncio.gather(read(links, "d", submit("a", 3)), read(links, "d", submit("b", 2)))
    assert tokens_of(first) == [7, 8, 9]
    assert tokens_of(second) == [7, 8]
    assert isinstance(first[-1], Done)
    assert fake.attached == ["d"]
    assert fake.cancels == []
    await links.close()


@on_virtual_time
async def test_each_address_has_its_own_stream() -> None:
    fake = FakeDecode(answer=(7,))
    links = DecodeLinks(fake)
    await asyncio.gather(read(links, "d0", submit(max_tokens=1)), read(links, "d1", submit(max_tokens=1)))
    assert sorted(fake.attached) == ["d0", "d1"]
    await links.close()


@on_virtual_time
async def test_leaving_before_the_end_cancels() -> None:
    fake = FakeDecode(answer=(7, 8, 9))
    links = DecodeLinks(fake)
    async with links.submit("d", submit()) as events:
        await anext(events)
    await asyncio.sleep(STEP_S)
    assert fake.cancels == ["r#1"]
    assert fake.running == set()
    await links.close()


@on_virtual_time
async def test_leaving_before_the_submit_is_sent_sends_nothing() -> None:
    fake = FakeDecode(answer=(7,))
    links = DecodeLinks(fake)
    async with links.submit("d", submit()):
        pass
    await asyncio.sleep(1)
    assert (fake.submits, fake.cancels) == ([], [])
    await links.close()


@on_virtual_time
async def test_leaving_while_the_submit_is_being_sent_cancels_after_it() -> None:
    fake = FakeDecode()
    links = DecodeLinks(fake)
    async with links.submit("d", submit()):
        await asyncio.sleep(STEP_S * 1.05)
        assert fake.submits == []
    await asyncio.sleep(1)
    assert fake.cancels == ["r#1"]
    assert fake.running == set()
    await links.close()


@on_virtual_time
async def test_late_events_of_a_cancelled_request_do_not_reach_its_successor() -> None:
    fake = FakeDecode()
    links = DecodeLinks(fake)
    async with links.submit("d", submit()):
        await asyncio.sleep(1)
    async with links.submit("d", submit()) as events:
        fake.push("d", Delta("r#1", 0, (Sampled(666),)), Done("r#1", 0, None))
        fake.push("d", Delta("r#2", 0, (Sampled(5),)))
        assert await anext(events) == Delta("r#2", 0, (Sampled(5),))
    await links.close()


@pytest.mark.parametrize("error", [Unavailable("connection reset"), None])
@on_virtual_time
async def test_a_broken_stream_fails_all_its_requests_and_the_next_reopens(error: Unavailable | None) -> None:
    fake = FakeDecode()
    links = DecodeLinks(fake)
    readers = [asyncio.create_task(read(links, "d", submit(name))) for name in "ab"]
    await asyncio.sleep(1)
    fake.break_link("d", error)
    for [event] in await asyncio.gather(*readers):
        assert isinstance(event, Failed)
        assert isinstance(event.error, Unavailable)
        assert "decode worker at d" in str(event.error)
    fake.answer = (7, 8, 9)
    assert tokens_of(await read(links, "d", submit())) == [7, 8, 9]
    assert fake.attached == ["d", "d"]
    assert fake.cancels == []
    await links.close()


@on_virtual_time
async def test_an_address_where_nobody_listens_fails_the_request() -> None:
    fake = FakeDecode(answer=(7,))
    fake.down = {"d"}
    links = DecodeLinks(fake)
    [event] = await read(links, "d", submit())
    assert isinstance(event, Failed)
    assert "nobody listens at d" in str(event.error)
    fake.down = set()
    assert tokens_of(await read(links, "d", submit(max_tokens=1))) == [7]
    await links.close()


@on_virtual_time
async def test_close_fails_what_runs_and_what_comes_later() -> None:
    fake = FakeDecode()
    links = DecodeLinks(fake)
    reader = asyncio.create_task(read(links, "d", submit()))
    await asyncio.sleep(1)
    unstarted = asyncio.create_task(read(links, "e", submit()))
    await asyncio.sleep(0)
    await links.close()
    for events in (await reader, await unstarted):
        assert [type(event) for event in events] == [Failed]
    assert fake.running == set()
    with pytest.raises(Unavailable, match="shutting down"):
        await read(links, "d", submit())


@on_virtual_time
async def test_a_cancelled_reader_cancels_its_request() -> None:
    fake = FakeDecode()
    links = DecodeLinks(fake)
    reader = asyncio.create_task(read(links, "d", submit()))
    await asyncio.sleep(1)
    assert fake.running == {"r#1"}
    reader.cancel()
    await asyncio.sleep(STEP_S)
    assert fake.running == set()
    assert reader.cancelled()
    await links.close()
