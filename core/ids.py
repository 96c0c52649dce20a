"""Types of the numbers and names that travel between the packages: a page is never a slot."""

from typing import NewType

RequestId = NewType("RequestId", str)
SlotId = NewType("SlotId", int)
"""A row of the engine's per-sequence tensors; lent to a running sequence, given back when it leaves."""
