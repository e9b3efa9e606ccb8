"""The receiver: each block of each layer, whole, in any order; what does not fit is refused and changes nothing."""

from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.batch import KVLayout
from engine.errors import LayoutMismatch, TransferFailed
from kvtransfer.frames import Begin, KVBlocks, KVRange
from kvtransfer.receive import KVReceiver

LAYOUT = KVLayout("m", num_layers=3, num_kv_heads=2, head_dim=4, dtype="float32", block_size=4, num_blocks=10)
TOKEN_BYTES = LAYOUT.token_bytes


def begin(prompt_tokens: int = 10, first_token: int = 0, layout: KVLayout = LAYOUT) -> Begin:
    return Begin(prompt_tokens, first_token, 0, layout)


def receiver(prompt_tokens: int = 10, have_tokens: int = 0) -> KVReceiver:
    return KVReceiver(begin(prompt_tokens, have_tokens), LAYOUT, prompt_tokens, have_tokens)


def frame(first_token: int, num_blocks: int = 1, block_tokens: int = 4, layers: range = range(3)) -> KVBlocks:
    payload = bytes(len(layers) * num_blocks * block_tokens * TOKEN_BYTES)
    return KVBlocks(first_token, num_blocks, block_tokens, layers.start, len(layers), payload)


def test_blocks_layers_and_tail_in_any_order():
    state = receiver(10)
    for part in (
        frame(8, 1, 2, range(1, 3)),
        frame(0, 2, 4, range(2, 3)),
        frame(4, 1, 4, range(2)),
        frame(8, 1, 2, range(1)),
    ):
        state.accept(part)
        assert not state.complete
    state.accept(frame(0, 1, 4, range(2)))
    assert state.complete


def test_what_the_receiver_has_is_not_waited_for():
    state = receiver(10, have_tokens=8)
    with pytest.raises(TransferFailed, match=r"frame names tokens \[4, 8\)"):
        state.accept(frame(4))
    state.accept(frame(8, 1, 2))
    assert state.complete


def test_a_stream_starts_on_a_block_of_either_side():
    """A decode worker would receive into a block that others read."""
    sender = replace(LAYOUT, block_size=2)
    with pytest.raises(TransferFailed, match="stream starts inside a block: token 2"):
        KVReceiver(begin(10, 2, sender), LAYOUT, 10, 4)
    with pytest.raises(TransferFailed, match="stream starts inside a block: token 4"):
        KVReceiver(begin(10, 4, replace(LAYOUT, block_size=8)), LAYOUT, 10, 4)


def test_no_more_tokens_were_cached_than_there_are():
    with pytest.raises(TransferFailed, match="1099511627776 of 10 tokens were cached"):
        KVReceiver(Begin(10, 0, 1 << 40, LAYOUT), LAYOUT, 10, 0)


def test_a_sender_may_start_before_what_the_receiver_has():
    state = KVReceiver(begin(10, 4), LAYOUT, 10, 8)
    state.accept(frame(4))
    state.accept(frame(8, 1, 2))
    assert state.complete


def test_a_sender_with_another_block_size_is_counted_in_its_own_blocks():
    sender = replace(LAYOUT, block_size=8, num_blocks=3)
    state = KVReceiver(begin(10, 0, sender), LAYOUT, 10, 0)
    with pytest.raises(TransferFailed, match="frame of 2 blocks of 4 tokens does not fit"):
        state.accept(frame(0, 2, 4))
    state.accept(frame(0, 1, 8))
    state.accept(frame(8, 1, 2))
    assert state.complete


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (frame(12), r"frame names tokens \[12, 16\)"),
        (frame(8), r"frame names tokens \[8, 12\)"),
        (frame(2), r"frame names tokens \[2, 6\)"),
        (frame(0, 1, 3), "frame of 1 blocks of 3 tokens does not fit"),
        (frame(9, 1, 1), r"frame names tokens \[9, 10\)"),
        (frame(0, 3), r"frame names tokens \[0, 12\)"),
        (frame(0, 0), "frame is empty"),
        (frame(0, layers=range(2, 4)), r"names layers range\(2, 4\) of 3"),
        (frame(0, layers=range(0)), "frame is empty"),
        (replace(frame(0), payload=bytes(5)), "frame holds 5 bytes of KV, expected 768"),
        (replace(frame(0), payload=bytes(769)), "frame holds 769 bytes of KV, expected 768"),
    ],
)
def test_what_does_not_fit_is_refused_in_words(bad: KVBlocks, text: str):
    state = receiver(10)
    with pytest.raises(TransferFailed, match=text):
        state.accept(bad)
    for good in (frame(0, 2), frame(8, 1, 2)):
        state.accept(good)
    assert state.complete, "the refused frame has left no trace"


@pytest.mark.parametrize("again", [frame(0), frame(4), frame(0, 2), frame(4, layers=range(1, 2))])
def test_what_came_before_is_not_taken(again: KVBlocks):
    state = receiver(10)
    assert state.accept(frame(0, 2))
    assert not state.accept(again)
    assert not state.complete
    assert state.accept(frame(8, 1, 2))
    assert state.complete


def test_a_frame_that_is_new_in_part_is_taken():
    state = receiver(8)
    assert state.accept(frame(4, layers=range(1, 2)))
    assert state.accept(frame(0, 2))
    assert state.complete


def test_what_is_missing_is_named_in_whole_blocks_of_the_sender():
    state = receiver(10)
    assert state.missing() == (KVRange(0, 10, 0, 3),)
    state.accept(frame(4, layers=range(1, 2)))
    assert state.missing() == (KVRange(0, 10, 0, 1), KVRange(0, 4, 1, 2), KVRange(8, 10, 1, 2), KVRange(0, 10, 2, 3))
    state.accept(frame(0, 2))
    assert state.missing() == (KVRange(8, 10, 0, 3),)
    state.accept(frame(8, 1, 2))
    assert state.missing() == ()
    assert state.last_block() == (KVRange(8, 10, 0, 1),)


def test_only_a_stream_like_the_first_may_bring_the_rest():
    state = receiver(10)
    state.begins_again(begin(10))
    for other in (begin(10, 4), begin(9), begin(10, layout=replace(LAYOUT, block_size=8))):
        with pytest.raises(TransferFailed, match="has changed"):
            state.begins_again(other)


@pytest.mark.parametrize(
    ("opening", "error", "text"),
    [
        (begin(10, layout=replace(LAYOUT, num_layers=4)), LayoutMismatch, "sender's KV is"),
        (begin(10, layout=replace(LAYOUT, model="other")), LayoutMismatch, "sender's KV is"),
        (begin(10, layout=replace(LAYOUT, dtype="int3")), LayoutMismatch, "sender's KV is"),
        (begin(10, layout=replace(LAYOUT, block_size=0)), LayoutMismatch, "sender's KV is"),
        (begin(11), TransferFailed, r"stream offers tokens \[0, 11\) where \[8, 10\) were asked for"),
        (begin(10, 9), TransferFailed, r"stream offers tokens \[9, 10\)"),
        (begin(10, 2), TransferFailed, "stream starts inside a block: token 2"),
    ],
)
def test_a_stream_that_was_not_asked_for_is_refused(opening: Begin, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        KVReceiver(opening, LAYOUT, prompt_tokens=10, have_tokens=8)


class ReceiverMachine(RuleBasedStateMachine):
    """Against a model: the set of (layer, token) that has come."""

    @initialize(
        prompt_tokens=st.integers(1, 30),
        have_blocks=st.integers(0, 7),
        sender_block=st.sampled_from([2, 4, 8]),
        layers=st.integers(1, 3),
    )
    def start(self, prompt_tokens: int, have_blocks: int, sender_block: int, layers: int) -> None:
        own = replace(LAYOUT, num_layers=layers)
        self.sender = replace(own, block_size=sender_block)
        self.prompt_tokens = prompt_tokens
        have_tokens = min(have_blocks, (prompt_tokens - 1) // 4) * 4
        self.first_token = have_tokens // sender_block * sender_block
        self.state = KVReceiver(begin(prompt_tokens, self.first_token, self.sender), own, prompt_tokens, have_tokens)
        self.missing = {(layer, token) for layer in range(layers) for token in range(self.first_token, prompt_tokens)}
        self.expected = frozenset(self.missing)

    @precondition(lambda self: self.missing)
    @rule(pick=st.integers(0, 1000), wide=st.booleans(), deep=st.booleans())
    def next_block(self, pick: int, wide: bool, deep: bool) -> None:
        """A frame around something that is missing still: usually fits, may overlap what came."""
        layer, token = sorted(self.missing)[pick % len(self.missing)]
        first = token // self.sender.block_size * self.sender.block_size
        tokens = min(self.sender.block_size, self.prompt_tokens - first)
        blocks = 2 if wide and first + 2 * self.sender.block_size <= self.prompt_tokens else 1
        layers = range(layer, min(layer + 2 if deep else layer + 1, self.sender.num_layers))
        self.offer(frame(first, blocks, tokens, layers))

    @rule(
        first=st.integers(-2, 34),
        blocks=st.integers(-1, 4),
        tokens=st.integers(-1, 9),
        layer=st.integers(-1, 3),
        layers=st.integers(0, 3),
        extra_bytes=st.sampled_from([0, 0, 0, -1, 1]),
    )
    def anything(self, first: int, blocks: int, tokens: int, layer: int, layers: int, extra_bytes: int) -> None:
        size = max(0, layers * blocks * tokens * TOKEN_BYTES + extra_bytes)
        self.offer(KVBlocks(first, blocks, tokens, layer, layers, bytes(size)))

    def offer(self, block_frame: KVBlocks) -> None:
        content = {
            (layer, token)
            for layer in block_frame.layers
            for token in range(block_frame.first_token, block_frame.end_token)
        }
        size = self.sender.block_size
        is_tail = block_frame.end_token == self.prompt_tokens and block_frame.num_blocks == 1
        fits = (
            block_frame.num_blocks > 0
            and block_frame.block_tokens > 0
            and bool(content)
            and content <= self.expected
            and block_frame.first_token % size == 0
            and (block_frame.block_tokens == size or (is_tail and block_frame.block_tokens < size))
            and len(block_frame.payload) == len(content) * TOKEN_BYTES
        )
        if fits:
            assert self.state.accept(block_frame) == bool(content & self.missing)
            self.missing -= content
        else:
            with pytest.raises(TransferFailed):
                self.state.accept(block_frame)

    @invariant()
    def complete_when_nothing_is_missing(self) -> None:
        if hasattr(self, "state"):
            assert self.state.complete == (not self.missing)

    @invariant()
    def missing_is_what_has_not_come(self) -> None:
        if hasattr(self, "state"):
            named = [
                (layer, token)
                for part in self.state.missing()
                for layer in range(part.first_layer, part.end_layer)
                for token in range(part.first_token, part.end_token)
            ]
            assert sorted(named) == sorted(self.missing)


TestReceiver = ReceiverMachine.TestCase
