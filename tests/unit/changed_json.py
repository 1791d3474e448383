"""A JSON file torn and changed by hand at every kind of place, for readers that must refuse it in one line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from usr_ray.config import UserError

_WRONG = (None, "x", [], {"x": 1}, 7)
_GONE = object()


def changed(content: bytes) -> Iterator[tuple[str, bytes]]:
    """(What was done, the file then): torn, not JSON, and each value replaced or taken out; of a list its first."""
    yield "torn", content[: len(content) // 2]
    yield "emptied", b""
    yield "no text", b"\xff\xfe{"
    value = json.loads(content)
    for path in _places(value, ()):
        for wrong in (*_WRONG, _GONE) if path else _WRONG:
            whole = [copy.deepcopy(value)]
            at: Any = whole
            for key in (0, *path)[:-1]:
                at = at[key]
            last = (0, *path)[-1]
            if wrong is _GONE:
                del at[last]
            else:
                at[last] = wrong
            how = "gone" if wrong is _GONE else json.dumps(wrong)
            yield f"{'.'.join(map(str, path))} = {how}", json.dumps(whole[0]).encode()


def _places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value[:1]) if isinstance(value, list) else ()
    for key, below in inner:
        yield from _places(below, (*path, key))


def refusals(path: Path, read: Callable[[], object]) -> list[str]:
    """The lines with which `read` refuses what `path` is changed to; any other error fails, with what was done."""
    content, lines = path.read_bytes(), []
    try:
        for how, then in changed(content):
            path.write_bytes(then)
            try:
                read()
            except UserError as error:
                lines.append(str(error))
            except Exception as error:
                raise AssertionError(f"{path.name} {how}: {type(error).__name__}: {error}") from error
    finally:
        path.write_bytes(content)
    return lines
