"""Checkpoints: tensors as safetensors, everything else as JSON.

    checkpoints/step_00001000/
        model.safetensors       fp32 weights by name, a tied head once
        optimizer.safetensors   'exp_avg/<name>', 'exp_avg_sq/<name>', ...
        state.json              step, architecture, sizes and SHA-256 of both
    checkpoints/latest          link to the newest

A checkpoint is written aside, fsynced and renamed, so that a folder with the
final name is complete. Nothing is unpickled.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from training.run_log import point_to, write_json

FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that is absent, damaged, or of another model."""


def save_checkpoint(run_folder, model, optimizer, *, step, val_loss=None,
                    keep=2) -> Path:
    """Write checkpoints/step_XXXXXXXX and prune older ones.

    `step` counts finished updates, `val_loss` is the evaluation at that step,
    if there was one. The `keep` newest and the best by `val_loss` stay.
    """
    folder = Path(run_folder) / 'checkpoints'
    folder.mkdir(exist_ok=True)
    final = folder / f'step_{step:08d}'
    part = folder / f'.{final.name}.part'
    for left_over in folder.glob('.*.part'):
        shutil.rmtree(left_over)  # of a save that was killed
    part.mkdir()

    names = {p: n for n, p in model.named_parameters()}
    save_file({n: p.detach() for p, n in names.items()},
              part / 'model.safetensors')
    moments = {f'{key}/{names[p]}': value
               for p, state in optimizer.state.items()
               for key, value in state.items()}
    save_file(moments, part / 'optimizer.safetensors')
    files = {name: {'bytes': (part / name).stat().st_size,
                    'sha256': _sha256(part / name)}
             for name in ('model.safetensors', 'optimizer.safetensors')}
    write_json(part / 'state.json', {
        'format_version': FORMAT_VERSION, 'step': step, 'val_loss': val_loss,
        'architecture': model.config.to_dict(), 'files': files})
    for path in [*part.iterdir(), part]:
        _fsync(path)
    if final.exists():  # the same step, trained again after a resume
        shutil.rmtree(final)
    os.rename(part, final)
    point_to(folder / 'latest', final.name)
    _fsync(folder)
    _prune(folder, keep)
    return final


def _prune(folder: Path, keep: int):
    found = sorted(folder.glob('step_*'))
    scored = [(read_state(c)['val_loss'], c) for c in found]
    best = min(((loss, c) for loss, c in scored if loss is not None),
               default=(None, None))[1]
    for checkpoint in found[:-keep]:
        if checkpoint != best:
            shutil.rmtree(checkpoint)


def find_checkpoint(run_folder) -> Path:
    """The newest checkpoint of a run; `run_folder` may be a checkpoint."""
    run_folder = Path(run_folder)
    if (run_folder / 'state.json').exists():
        return run_folder
    found = sorted((run_folder / 'checkpoints').glob('step_*'))
    if not found:
        raise CheckpointError(
            f'{run_folder} holds no checkpoint: the run ended before its '
            'first; start anew with --init_from=scratch')
    return found[-1]


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


def load_checkpoint(checkpoint: Path, model, optimizer=None) -> dict:
    """Load weights, and the optimizer's state if one is given; returns
    state.json. Checks hashes, names and shapes before it changes anything."""
    state = read_state(checkpoint)
    weights = _read_tensors(checkpoint, 'model.safetensors', state)
    parameters = dict(model.named_parameters())
    _compare(checkpoint, {n: tuple(p.shape) for n, p in parameters.items()},
             {n: tuple(t.shape) for n, t in weights.items()})
    moments = None
    if optimizer is not None:
        moments = _read_tensors(checkpoint, 'optimizer.safetensors', state)
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])
    if moments is not None:
        names = {p: n for n, p in parameters.items()}
        ordered = [names[p] for group in optimizer.param_groups
                   for p in group['params']]
        by_parameter = {name: {} for name in ordered}
        for key, value in moments.items():
            kind, name = key.split('/', 1)
            by_parameter[name][kind] = value
        optimizer.load_state_dict({
            'state': {i: by_parameter[name] for i, name in enumerate(ordered)
                      if by_parameter[name]},
            'param_groups': optimizer.state_dict()['param_groups']})
    return state


def _read_tensors(checkpoint, name, state) -> dict:
    path = Path(checkpoint) / name
    expected = state['files'][name]
    size = path.stat().st_size if path.exists() else None
    if size != expected['bytes']:
        raise CheckpointError(
            f'{path} has {size or 0:,} bytes where {expected["bytes"]:,} were '
            'written: the checkpoint is damaged; use an older one')
    if _sha256(path) != expected['sha256']:
        raise CheckpointError(f'{path} does not have the SHA-256 that was '
                              'written: it is damaged; use an older one')
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f'{path} cannot be read: {error}') from error


def _compare(checkpoint, model: dict, stored: dict):
    problems = [f'{n}: {model.get(n, "absent")} here, '
                f'{stored.get(n, "absent")} in the checkpoint'
                for n in sorted(model.keys() | stored.keys())
                if model.get(n) != stored.get(n)]
    if problems:
        more = len(problems) - 8
        shown = problems[:8] + ([f'and {more} more'] if more > 0 else [])
        raise CheckpointError(
            f'{checkpoint} is of another architecture:\n'
            + '\n'.join(f'  {p}' for p in shown))


def _sha256(path: Path) -> str:
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, 'sha256').hexdigest()


def _fsync(path: Path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
