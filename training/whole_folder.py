"""A folder that is whole as soon as it has its name."""

import contextlib
import os
import shutil
from pathlib import Path

from training.durable import FolderHeld, fsync, hold_lock, part_path

OURS = ('config.json', 'state.json')  # what a folder of a model has


class OutputError(ValueError):
    """A folder that cannot be written as asked."""


@contextlib.contextmanager
def whole_folder(out, overwrite: bool = False):
    """A hidden folder beside `out`, renamed to it when the block has ended.

    What an earlier, killed writer left is removed; an error leaves nothing.
    Raises OutputError where `out` exists, unless it is a folder of a model
    and `overwrite` is true, and where another process writes it.
    """
    out = Path(out).expanduser().absolute()
    part = part_path(out)
    old = out.with_name(f'.{out.name}.old.part')
    out.parent.mkdir(parents=True, exist_ok=True)
    if old.exists() and not out.exists():
        os.rename(old, out)  # killed between two renames
    check_free(out, overwrite)
    part.mkdir(exist_ok=True)
    try:
        lock = hold_lock(part)
    except FolderHeld:
        raise OutputError(f'{out} is being written by another process: wait '
                          'for it, or name another folder') from None
    with lock:
        try:
            for path in part.iterdir():
                if path.name != 'lock':
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield part
            for folder in (part, *(p for p in part.rglob('*') if p.is_dir())):
                fsync(folder)
            check_free(out, overwrite)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(out, old)
        os.rename(part, out)
        # not before: another writer would take the folder as left by a kill
        (out / 'lock').unlink()
        fsync(out.parent)
        shutil.rmtree(old, ignore_errors=True)


def check_free(out: Path, overwrite: bool):
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise OutputError(f'{out} exists: name another folder, or give '
                          '--overwrite to replace it')
    if out.is_symlink() or not any((out / name).is_file() for name in OURS):
        raise OutputError(f'{out} exists and is no folder of a model, so it '
                          'is not replaced: name another folder')
