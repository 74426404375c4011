"""Files that are whole under their name, durable, or held by one process."""

import contextlib
import fcntl
import json
import os
import platform
from pathlib import Path


class FolderHeld(ValueError):
    """Another process holds a folder; `holder` names it."""

    def __init__(self, folder, holder: str):
        self.holder = holder
        super().__init__(f'{folder} is held by {holder}')


def hold_lock(folder: Path):
    """The open lock of a folder; FolderHeld where another process has it."""
    # flock, since the kernel drops it with the process, however that ends
    lock = open(folder / 'lock', 'a+')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or 'another process'
        lock.close()
        raise FolderHeld(folder, holder) from None
    lock.truncate(0)
    lock.write(f'process {os.getpid()} on {platform.node()}\n')
    lock.flush()
    return lock


def is_held(folder) -> bool:
    """Whether some process holds the folder's lock."""
    path = Path(folder) / 'lock'
    if not path.exists():
        return False
    with open(path) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def naming(path: Path):
    """An OSError of a write, on a full disk, does not know its file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync(path: Path):
    """Make a file's content, or the renames in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def part_path(path: Path) -> Path:
    """The hidden name under which `path` is written until it is whole."""
    return path.with_name(f'.{path.name}.part')


def write_bytes(path: Path, content: bytes):
    """A new file, durable when this returns."""
    path.parent.mkdir(exist_ok=True)
    with naming(path), open(path, 'xb') as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str):
    """Write aside, fsync, rename: a reader sees the old file or the new."""
    with naming(path), open(part_path(path), 'w', encoding='utf-8') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part_path(path), path)


def write_json(path: Path, value):
    """As write_text."""
    write_text(path, json.dumps(value, indent=2) + '\n')


def point_to(link: Path, target: str):
    """Make `link` a relative symbolic link to `target`, atomically."""
    part = part_path(link)
    part.unlink(missing_ok=True)
    part.symlink_to(target)
    os.replace(part, link)
