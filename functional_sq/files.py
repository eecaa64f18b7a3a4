"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` when the block ends, and vanishes if the block raises.

    It is written beside `path`, flushed to the disk and renamed, so a reader sees the old file or the
    new one, also after a crash.

    Args:
        path: the file; one that exists is replaced, and of a link what it points to. Its permissions stay.

    Raises:
        OSError: the file cannot be written, or `path` is a folder, a pipe or a device; nothing is left behind.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "x")
        ...     with replacing(path) as file:
        ...         _ = file.write(b"new")
        ...     path.read_bytes()
        b'new'
    """
    path = Path(os.path.realpath(path))  # a rename would replace a link, not the file it points to
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no file but a folder, a pipe or a device, which stays; give another path")
    # Not tempfile: it makes files that only their owner can read, and the rename would keep that.
    # Not named after `path`, whose name may be as long as a name can be.
    beside = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with open(beside, "xb") as file:
            if path.exists():
                os.chmod(beside, stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
