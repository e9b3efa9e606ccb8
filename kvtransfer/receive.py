"""The receiving end of one KV stream: a pure state machine that says which frames belong, and when all is there.

    tokens   [0 ...... begin.first_token)[ ............ received or missing ............ begin.prompt_tokens)
              the receiver has these           one bit per layer and block of the sender

A frame is taken in any order, but only once and only whole: whatever does not fit raises, and changes nothing.
"""

from __future__ import annotations

from engine.batch import ELEMENT_BYTES, KVLayout
from engine.errors import LayoutMismatch, TransferFailed
from kvtransfer.frames import Begin, KVBlocks


class KVReceiver:
    """Checks one stream's frames against its Begin. `layout` is the receiver's own."""

    def __init__(self, begin: Begin, layout: KVLayout, prompt_tokens: int, have_tokens: int) -> None:
        theirs = begin.layout
        if not theirs.matches(layout) or theirs.dtype not in ELEMENT_BYTES or theirs.block_size < 1:
            raise LayoutMismatch(f"sender's KV is {theirs}, receiver's is {layout}")
        if begin.prompt_tokens != prompt_tokens or not 0 <= begin.first_token <= have_tokens:
            raise TransferFailed(
                f"stream offers tokens [{begin.first_token}, {begin.prompt_tokens}) "
                f"where [{have_tokens}, {prompt_tokens}) were asked for"
            )
        if begin.first_token % theirs.block_size:
            raise TransferFailed(f"stream starts inside a block: token {begin.first_token}")
        self._begin = begin
        self._sender = theirs
        self._received = [0] * layout.num_layers
        blocks = -(-(prompt_tokens - begin.first_token) // theirs.block_size)
        self._missing = blocks * layout.num_layers

    @property
    def complete(self) -> bool:
        """True when every block of every layer is there."""
        return self._missing == 0

    def accept(self, frame: KVBlocks) -> None:
        """Takes a frame into account. Raises TransferFailed when it does not belong or came before."""
        self._check_shape(frame)
        first_block = (frame.first_token - self._begin.first_token) // self._sender.block_size
        mask = ((1 << frame.num_blocks) - 1) << first_block
        if any(self._received[layer] & mask for layer in frame.layers):
            raise TransferFailed(f"KV of tokens [{frame.first_token}, {frame.end_token}) came twice")
        for layer in frame.layers:
            self._received[layer] |= mask
        self._missing -= frame.num_blocks * frame.num_layers

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
