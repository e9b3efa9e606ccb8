"""What Python's collector of reference cycles looks at in a process that serves.

A full collection stops the whole process while it goes over every object that exists. What the imports alone leave, of
torch above all, takes it more than 0.1 s, and every stream of the process would wait that long for its next token, over
and over. But what is there once a process serves stays until it ends, so none of it has to be looked at.
"""

from __future__ import annotations

import gc


def set_aside_what_is_loaded() -> None:
    """Collects once more, and never again what is left then. For the moment before a process serves; `gc.unfreeze`
    takes it back."""
    gc.collect()
    gc.freeze()
