"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlo.errors import MloError

if sys.platform != "win32":  # which has no such locks
    import fcntl


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path beside `path` to write to; at the end of the block the new file takes the place of the old one.

    If the block raises, the new file is removed and the old one is as it was.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def alone(path: str | os.PathLike[str], refusal: str) -> Iterator[None]:
    """Be the only process in such a block for a file or folder (where the platform has file locks).

    Args:
        path: of one that is there; a file must not be replaced meanwhile.
        refusal: of the error, if there is another process.

    Raises:
        MloError: another process is in such a block.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MloError(refusal) from error
        yield
    finally:
        os.close(descriptor)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
