"""The receiving end of a prompt's KV: a pure state machine that says which frames belong, and what is missing.

    tokens   [0 ...... begin.first_token)[ ............ received or missing ............ begin.prompt_tokens)
              the receiver has these           one bit per layer and block of the sender

Frames are taken in any order, whole: whatever does not fit raises, and changes nothing. One that brings nothing new is
not taken. What is missing after a stream's end may come by another stream that begins alike.
"""

from __future__ import annotations

from engine.batch import ELEMENT_BYTES, KVLayout
from engine.errors import LayoutMismatch, TransferFailed
from kvtransfer.frames import Begin, KVBlocks, KVRange


class KVReceiver:
    """Checks frames against their stream's Begin. `layout` is the receiver's own. Without `wants_kv` none come."""

    def __init__(
        self, begin: Begin, layout: KVLayout, prompt_tokens: int, have_tokens: int, *, wants_kv: bool = True
    ) -> None:
        theirs = begin.layout
        if not theirs.matches(layout) or theirs.dtype not in ELEMENT_BYTES or theirs.block_size < 1:
            raise LayoutMismatch(f"sender's KV is {theirs}, receiver's is {layout}")
        if begin.prompt_tokens != prompt_tokens or not 0 <= begin.first_token <= have_tokens:
            raise TransferFailed(
                f"stream offers tokens [{begin.first_token}, {begin.prompt_tokens}) "
                f"where [{have_tokens}, {prompt_tokens}) were asked for"
            )
        if begin.cached_tokens > prompt_tokens:
            raise TransferFailed(f"stream says that {begin.cached_tokens} of {prompt_tokens} tokens were cached")
        if begin.first_token % theirs.block_size or begin.first_token % layout.block_size:
            raise TransferFailed(f"stream starts inside a block: token {begin.first_token}")
        self._begin = begin
        self._sender = theirs
        self._received = [0] * layout.num_layers
        blocks = -(-(prompt_tokens - begin.first_token) // theirs.block_size)
        self._missing = blocks * layout.num_layers if wants_kv else 0

    @property
    def complete(self) -> bool:
        """True when every block of every layer is there, or none is wanted."""
        return self._missing <= 0

    def accept(self, frame: KVBlocks) -> bool:
        """Takes a frame into account; False where all of it was there already. Raises TransferFailed when it does not
        belong."""
        self._check_shape(frame)
        first_block = (frame.first_token - self._begin.first_token) // self._sender.block_size
        mask = ((1 << frame.num_blocks) - 1) << first_block
        before = self._missing
        for layer in frame.layers:
            self._missing -= (mask & ~self._received[layer]).bit_count()
            self._received[layer] |= mask
        return self._missing < before

    def begins_again(self, begin: Begin) -> None:
        """Another stream brings what is missing. Raises TransferFailed when it is not like the first."""
        if (begin.layout, begin.first_token, begin.prompt_tokens) != (
            self._sender,
            self._begin.first_token,
            self._begin.prompt_tokens,
        ):
            raise TransferFailed("the prefill worker has changed while KV was fetched again")

    def last_block(self) -> tuple[KVRange, ...]:
        """The sender's last block, in one layer: the least that can be asked for."""
        tokens, size = self._begin.prompt_tokens, self._sender.block_size
        return (KVRange((tokens - 1) // size * size, tokens, 0, 1),)

    def missing(self) -> tuple[KVRange, ...]:
        """What is not there yet, in whole blocks of the sender."""
        if self.complete:
            return ()
        size, first, layers = self._sender.block_size, self._begin.first_token, self._sender.num_layers
        blocks = -(-(self._begin.prompt_tokens - first) // size)
        found: list[KVRange] = []
        layer = 0
        while layer < layers:
            received, first_layer = self._received[layer], layer
            while layer < layers and self._received[layer] == received:
                layer += 1
            block = 0
            while block < blocks:
                start = block
                while block < blocks and not received >> block & 1:
                    block += 1
                if start < block:
                    end_token = min(first + block * size, self._begin.prompt_tokens)
                    found.append(KVRange(first + start * size, end_token, first_layer, layer))
                block += 1
        return tuple(found)

    def _check_shape(self, frame: KVBlocks) -> None:
        sender, begin = self._sender, self._begin
        is_tail = frame.num_blocks == 1 and frame.end_token == begin.prompt_tokens
        if not (frame.block_tokens == sender.block_size or (is_tail and frame.block_tokens < sender.block_size)):
            raise TransferFailed(f"frame of {frame.num_blocks} blocks of {frame.block_tokens} tokens does not fit")
        is_empty = min(frame.num_blocks, frame.block_tokens, frame.num_layers) < 1
        if is_empty or frame.first_layer < 0 or frame.layers.stop > sender.num_layers:
            raise TransferFailed(f"frame is empty or names layers {frame.layers} of {sender.num_layers}")
        inside = begin.first_token <= frame.first_token and frame.end_token <= begin.prompt_tokens
        if not inside or frame.first_token % sender.block_size:
            raise TransferFailed(f"frame names tokens [{frame.first_token}, {frame.end_token})")
        expected_bytes = frame.num_layers * frame.num_blocks * frame.block_tokens * sender.token_bytes
        if len(frame.payload) != expected_bytes:
            raise TransferFailed(f"frame holds {len(frame.payload)} bytes of KV, expected {expected_bytes}")
