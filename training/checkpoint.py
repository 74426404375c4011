"""Checkpoints: tensors as safetensors, everything else as JSON.

    checkpoints/step_00001000/
        model.safetensors       fp32 weights by name, a tied head once
        optimizer.safetensors   'exp_avg/<name>', 'exp_avg_sq/<name>'
        state.json              step, architecture, sizes and SHA-256 of both
    checkpoints/latest          link to the newest

Of several ranks, each writes what it holds, or its share of what all hold, to
files of its own (model-00000-of-00002.safetensors). A tensor that lies whole
in one file has its name and shape; a part of one is flat and named
'<name>@<start>', where it begins in the flattened tensor. So any number of
ranks and any strategy can read what any other wrote.

A checkpoint is written aside, fsynced and renamed, so that a folder with the
final name is complete. What cannot be written is tried once more. Nothing is
unpickled.
"""

import hashlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from training.distributed import OtherRankFailed, Ranks, all_or_none, on_main
from training.durable import fsync, part_path, point_to, write_json
from training.stop_signals import NO_STOP
from training.strategies import MOMENTS
from training.tensor_files import not_finite

FORMAT_VERSION = 1
CHUNK_BYTES = 2**24
RETRY_AFTER_S = 2.0  # a quota or a network file system may recover


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or of another model."""


# --- writing ---------------------------------------------------------------


def save_checkpoint(run_folder, strategy, *, step, val_loss=None,
                    keep=2) -> Path:
    """Write checkpoints/step_XXXXXXXX, on all ranks together; then prune.

    `step` counts finished updates, `val_loss` is the evaluation at that step,
    if there was one. The `keep` newest and the best by `val_loss` stay;
    nothing is pruned before the new one is durable. A second failure to write
    is raised: OSError where it happened, OtherRankFailed elsewhere.
    """
    ranks = strategy.ranks
    folder = Path(run_folder) / 'checkpoints'
    final = folder / f'step_{step:08d}'
    try:
        _write(folder, final, strategy, step, val_loss)
    except (OSError, OtherRankFailed) as error:
        if isinstance(error, OSError):
            print(f'warning: the checkpoint of step {step} cannot be written '
                  f'({error}); trying once more', file=sys.stderr)
        time.sleep(RETRY_AFTER_S)
        try:
            _write(folder, final, strategy, step, val_loss)
        except (OSError, OtherRankFailed):
            on_main(ranks, _clean, folder)  # room for the log's last line
            raise
    on_main(ranks, _clean, folder, keep, final.name)
    return final


def _write(folder: Path, final: Path, strategy, step: int, val_loss):
    """All ranks: write aside, fsync, rename, move `latest`."""
    ranks = strategy.ranks
    part = part_path(final)

    def begin():
        folder.mkdir(exist_ok=True)
        _clean(folder)  # of a save that was killed or failed
        part.mkdir()

    def publish():
        files = {}
        for path in sorted(part.glob('*.files.json')):
            files |= json.loads(path.read_text())
            path.unlink()
        write_json(part / 'state.json', {
            'format_version': FORMAT_VERSION, 'step': step,
            'val_loss': val_loss, 'world_size': ranks.world_size,
            'optimizer_steps': strategy.optimizer_steps,
            'architecture': strategy.model.config.to_dict(), 'files': files})
        fsync(part)
        if final.exists():  # damaged, and trained again from one before
            os.rename(final, folder / f'.{final.name}.old.part')
        os.rename(part, final)
        fsync(folder)
        point_to(folder / 'latest', final.name)
        fsync(folder)

    on_main(ranks, begin)
    all_or_none(_write_share, part, strategy)
    on_main(ranks, publish)


def _clean(folder: Path, keep: int | None = None, newest: str = ''):
    """Remove what saves have left, and checkpoints beyond the `keep` newest.

    That a folder cannot be removed is no reason to stop: on a network file
    system it is enough that someone reads a file in it.
    """
    try:
        for part in folder.glob('.*.part'):
            if part.is_symlink():
                part.unlink()  # the next `latest`
            else:
                shutil.rmtree(part)
        if keep is not None:
            _prune(folder, keep, newest)
    except OSError as error:
        print(f'warning: {folder} holds what cannot be removed ({error})',
              file=sys.stderr)


def _write_share(part: Path, strategy):
    """This rank's two files, with a list of their sizes and hashes."""
    ranks = strategy.ranks
    of_rank = '' if ranks.world_size == 1 else (
        f'-{ranks.rank:05d}-of-{ranks.world_size:05d}')
    weights = dict(_named(p, p.weight, p.name, strategy.weights_on_all_ranks,
                          ranks) for p in strategy.weights())
    moments = dict(_named(p, strategy.moment(p, kind), f'{kind}/{p.name}',
                          strategy.moments_on_all_ranks, ranks)
                   for p in strategy.pieces() for kind in MOMENTS)
    files = {}
    for name, tensors in ((f'model{of_rank}.safetensors', weights),
                          (f'optimizer{of_rank}.safetensors', moments)):
        try:
            save_file({k: t for k, t in tensors.items() if t.numel()},
                      part / name)
        except SafetensorError as error:  # a full disk
            raise OSError(
                f'{part / name} cannot be written: {error}') from error
        fsync(part / name)
        files[name] = {'bytes': (part / name).stat().st_size,
                       'sha256': _sha256(part / name)}
    write_json(part / f'{ranks.rank:05d}.files.json', files)


def _named(piece, value, name, on_all_ranks: bool, ranks: Ranks):
    """(key, tensor) of the share of a piece that this rank writes."""
    start = piece.start
    if on_all_ranks:
        a = len(value) * ranks.rank // ranks.world_size
        b = len(value) * (ranks.rank + 1) // ranks.world_size
        start, value = start + a, value[a:b]
    if len(value) == math.prod(piece.shape):
        return name, value.view(piece.shape)
    return f'{name}@{start}', value


def note_val_loss(checkpoint: Path, val_loss: float):
    """Into a checkpoint that was saved before its evaluation."""
    write_json(checkpoint / 'state.json',
               read_state(checkpoint) | {'val_loss': val_loss})


def _prune(folder: Path, keep: int, newest: str):
    # the run has gone back to one before those beyond the newest, since they
    # are damaged
    found = sorted(c for c in folder.glob('step_*') if c.name <= newest)
    scored = []
    for checkpoint in found:
        try:
            scored.append((read_state(checkpoint)['val_loss'], checkpoint))
        except CheckpointError:
            continue  # damaged later; it is not for pruning to judge
    best = min(((loss, c) for loss, c in scored
                if loss is not None and math.isfinite(loss)),
               default=(None, None))[1]
    for _, checkpoint in scored:
        if checkpoint != best and checkpoint not in found[-keep:]:
            # under its name a folder is complete: it must not be half gone
            part = part_path(checkpoint)
            os.rename(checkpoint, part)
            shutil.rmtree(part)


# --- reading ---------------------------------------------------------------


def find_checkpoints(run_folder) -> list[Path]:
    """All checkpoints of a run, newest first, at least one; `run_folder` may
    be a checkpoint itself."""
    run_folder = Path(run_folder)
    if (run_folder / 'state.json').exists():
        return [run_folder]
    found = sorted((run_folder / 'checkpoints').glob('step_*'), reverse=True)
    if not found:
        raise CheckpointError(
            f'{run_folder} holds no checkpoint: the run ended before its '
            'first; start anew with --init_from=scratch')
    return found


def find_checkpoint(run_folder) -> Path:
    """The newest checkpoint of a run."""
    return find_checkpoints(run_folder)[0]


def read_state(checkpoint: Path) -> dict:
    path = Path(checkpoint) / 'state.json'
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error
    if state.get('format_version') != FORMAT_VERSION:
        raise CheckpointError(
            f'{path} has format_version {state.get("format_version")}; this '
            f'version reads {FORMAT_VERSION}')
    return state


def verify_checkpoint(checkpoint: Path, ranks: Ranks = Ranks(),
                      stop=NO_STOP) -> dict:
    """state.json, once every file has the size and hash that were written,
    and numbers only.

    The ranks share the reading; all of them raise if one finds damage, and
    Stopped if one is told to stop. Without `ranks`, this process reads alone
    and waits for no other.
    """
    def check():
        state = read_state(checkpoint)
        files = sorted(state['files'].items())
        for name, expected in files:
            _check_size(Path(checkpoint) / name, expected['bytes'])
        for name, expected in files[ranks.rank::ranks.world_size]:
            _check_content(Path(checkpoint) / name, expected['sha256'], stop)
        return state

    # rank 0 alone exports: an agreement would wait for ranks that never come
    state = check() if ranks.world_size == 1 else all_or_none(check)
    stop.check()
    return state


REMEDY = 'remove its folder to go on from the one before'


def _check_size(path: Path, expected: int):
    size = path.stat().st_size if path.exists() else 0
    if size != expected:
        raise CheckpointError(
            f'{path} has {size:,} bytes where {expected:,} were written: the '
            f'checkpoint is damaged; {REMEDY}')


def _check_content(path: Path, sha256: str, stop):
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            if stop.received:
                return
    if digest.hexdigest() != sha256:
        raise CheckpointError(
            f'{path} does not have the SHA-256 that was written: the '
            f'checkpoint is damaged; {REMEDY}')
    file = _open(path)
    for key in file.keys():  # noqa: SIM118, not a dict
        _check_finite(path, key, file.get_tensor(key))


def _open(path: Path):
    try:
        return safe_open(path, 'pt')
    except SafetensorError as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error


def _check_finite(path: Path, key: str, tensor: torch.Tensor):
    if problem := not_finite(key, tensor):
        raise CheckpointError(
            f'{path}: {problem}: nothing can be trained or generated from '
            f'them; {REMEDY}, or name an older one')


class Tensors:
    """The tensors of a checkpoint's files, whole or in parts, by range."""

    def __init__(self, checkpoint: Path, state: dict, kind: str):
        self.checkpoint = Path(checkpoint)
        self.shapes = {}  # of those that lie whole in one file
        self._parts = {}  # name -> [(start, length, key, file)]
        for name in sorted(state['files']):
            if not name.startswith(kind):
                continue
            file = _open(self.checkpoint / name)
            for key in file.keys():  # noqa: SIM118, not a dict
                tensor, at, start = key.partition('@')
                shape = tuple(file.get_slice(key).get_shape())
                if not at:
                    self.shapes[tensor] = shape
                self._parts.setdefault(tensor, []).append(
                    (int(start or 0), math.prod(shape), key, file))

    def sizes(self) -> dict[str, int]:
        """{name: number of elements}; CheckpointError where parts are
        missing or overlap."""
        sizes = {}
        for name, parts in self._parts.items():
            end = 0
            for start, length, *_ in sorted(parts, key=lambda part: part[0]):
                if start != end:
                    raise CheckpointError(
                        f'{self.checkpoint}: {name} has a part at {start} '
                        f'where one at {end} is expected; files of different '
                        'checkpoints are mixed')
                end += length
            sizes[name] = end
        return sizes

    def read(self, name: str, start: int, out: torch.Tensor):
        """Fill the 1-D `out` with elements start.. of a flattened tensor."""
        end = start + len(out)
        for at, length, key, file in self._parts[name]:
            a, b = max(start, at), min(end, at + length)
            if a < b:
                part = file.get_slice(key)
                values = (part[a - at:b - at] if len(part.get_shape()) == 1
                          else part[:].flatten()[a - at:b - at])
                out[a - start:b - start].copy_(values)


@torch.no_grad()
def load_published(tensors, strategy, stop=NO_STOP):
    """Weights from a model that is no checkpoint into this rank's pieces;
    `tensors` is read by name and range, as Tensors are."""
    def load():
        for piece in strategy.weights():
            if stop.received:
                return
            tensors.read(piece.name, piece.start, piece.weight)

    all_or_none(load)
    stop.check()


@torch.no_grad()
def load_checkpoint(checkpoint: Path, strategy, with_optimizer=True,
                    stop=NO_STOP, state: dict | None = None) -> dict:
    """Weights and AdamW's state into this rank's pieces; state.json, which
    is `state` where the checkpoint has been verified already."""
    state = state or verify_checkpoint(checkpoint, strategy.ranks, stop)

    def load():
        weights = Tensors(checkpoint, state, 'model')
        check_shapes(checkpoint, strategy.model, weights, state)
        for piece in strategy.weights():
            if stop.received:
                return
            weights.read(piece.name, piece.start, piece.weight)
        if not with_optimizer:
            return
        moments = Tensors(checkpoint, state, 'optimizer')
        moments.sizes()
        for piece in strategy.pieces():
            if stop.received:
                return
            for kind in MOMENTS:
                moments.read(f'{kind}/{piece.name}', piece.start,
                             strategy.moment(piece, kind))
        strategy.optimizer_steps = state['optimizer_steps']

    all_or_none(load)
    stop.check()
    return state


def check_shapes(checkpoint, model, tensors: Tensors, state: dict):
    here = {n: tuple(p.shape) for n, p in model.named_parameters()}
    sizes = tensors.sizes()
    problems = []
    for name in sorted(here.keys() | sizes.keys()):
        stored = tensors.shapes.get(name)
        if stored is None and sizes.get(name) == math.prod(here.get(name, ())):
            stored = here[name]  # in parts, and as many elements
        if stored != here.get(name):
            problems.append(f'{name}: {here.get(name, "absent")} here, '
                            f'{stored or sizes.get(name, "absent")} in the '
                            'checkpoint')
    if problems:
        built = model.config.to_dict()
        fields = [f'{name}: {value} in the checkpoint, {built.get(name)} here'
                  for name, value in state['architecture'].items()
                  if built.get(name) != value]
        more = len(problems) - 4
        shown = fields + problems[:4] + (
            [f'and {more} more weights'] if more > 0 else [])
        raise CheckpointError(
            f'{checkpoint} is of another architecture; give the options that '
            'it was trained with:\n' + '\n'.join(f'  {p}' for p in shown))


def _sha256(path: Path) -> str:
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()
