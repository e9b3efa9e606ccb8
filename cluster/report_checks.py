"""What a worker's report may say: what a worker could have, and not too much of it. Pure.

Whatever passes here goes into sums, orders and forecasts for all workers: one number that is none would spoil them.
Each check raises InvalidArgument that names the first field that cannot be true.
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.errors import InvalidArgument
from engine.kv_events import NOTES_LIMIT
from engine.stats import LoopStats

MAX_NAME_CHARS = 256
MAX_LINKS = 1024
MAX_KV_NAMES = NOTES_LIMIT
LARGEST_BLOCK = 4096
# Far beyond any worker's: requests, tokens, seconds, and per second.
REQUESTS, TOKENS, SECONDS, PER_S = 1 << 20, 1 << 34, 1e6, 1e12
# Of what is divided by: anything slower takes for ever, and the time that it takes is no number any more.
SLOWEST_PER_S = 1e-3
LARGEST = {
    "running": REQUESTS,
    "waiting": REQUESTS,
    "queued_tokens": TOKENS,
    "context_tokens": TOKENS,
    "queued_s": SECONDS,
    "decode_step_s": SECONDS,
    "cost_error_median": PER_S,
    "cost_error_p90": PER_S,
}
# How many times slower or faster than its profile says.
SCALE = 1e4


def check_name(field: str, name: str) -> None:
    # What is printable cannot pretend to be another line of the log.
    if not 0 < len(name) <= MAX_NAME_CHARS or not name.isprintable():
        raise InvalidArgument(field, name, f"a name of at least one character, printable, at most {MAX_NAME_CHARS}")


def check_stats(stats: LoopStats) -> None:
    if not 0 < stats.block_size <= LARGEST_BLOCK or stats.blocks_total < 1:
        size = f"{stats.blocks_total} blocks of {stats.block_size} tokens"
        expected = f"at least one block of at least one token, and of at most {LARGEST_BLOCK}"
        raise InvalidArgument("blocks_total, block_size", size, expected)
    for name in ("blocks_free", "blocks_cached"):
        _check_number(name, getattr(stats, name), 0, stats.blocks_total)
    for name, largest in LARGEST.items():
        _check_number(name, getattr(stats, name), 0, largest)
    _check_rate("prefill_tokens_per_s", stats.prefill_tokens_per_s)
    for name in ("prefill_scale", "decode_scale"):
        _check_number(name, getattr(stats, name), 1 / SCALE, SCALE)


def check_links(links: Sequence[tuple[str, float]]) -> None:
    if len(links) > MAX_LINKS:
        raise InvalidArgument("links", f"{len(links)} links", f"at most {MAX_LINKS}")
    for address, rate in links:
        check_name("links.prefill_address", address)
        _check_rate("links.bytes_per_s", rate)


def check_kv_names(count: int) -> None:
    if count > MAX_KV_NAMES:
        raise InvalidArgument("kv_events", f"{count} names", f"at most {MAX_KV_NAMES} in a report")


def _check_rate(field: str, value: float) -> None:
    # 0 where nothing was measured yet.
    if value != 0:
        _check_number(field, value, SLOWEST_PER_S, PER_S)


def _check_number(field: str, value: float, least: float, largest: float) -> None:
    # NaN is in no range.
    if not least <= value <= largest:
        raise InvalidArgument(field, value, f"a number in [{least:g}, {largest:g}]")
