"""A way of benchmarks/interleaved.py for a process of its own, in a module that such a process loads at once."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from pathlib import Path


def counting(stack: contextlib.ExitStack, first: float, closed: Path) -> Callable[[], float]:
    """Returns `first` and the next number, then fails; `closed` is touched when it is let go."""
    stack.callback(closed.touch)
    numbers = itertools.count(first)

    def way() -> float:
        number = next(numbers)
        if number > first + 1:
            raise ValueError("no more")
        return number

    return way
