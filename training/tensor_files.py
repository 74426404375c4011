"""Safetensors files read and written one tensor at a time.

The library writes a file from tensors that are all in memory, and the pages of
a file that it has open stay mapped. Here a file is written from tensors that
are made one after another, and opened anew for each one read, so that the
memory in use is that of one tensor.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from training.durable import write_json

INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
# as https://huggingface.co/docs/safetensors names them; what weights are in
DTYPES = {'F32': torch.float32, 'BF16': torch.bfloat16, 'F16': torch.float16,
          'F64': torch.float64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFileError(ValueError):
    """A file of weights that is absent, damaged or of another kind."""


def write_tensors(path: Path, shapes: dict, dtype: torch.dtype, make) -> dict:
    """Write {name: shape} to a new file; make(name) gives a tensor's values.

    The file is durable when this returns. Returns its {'bytes', 'sha256'}.
    Format: the header's length (8 bytes), the header (JSON), the tensors
    without gaps (https://huggingface.co/docs/safetensors#format).
    """
    header, end = {'__metadata__': {'format': 'pt'}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {'dtype': NAMES[dtype], 'shape': list(shape),
                        'data_offsets': [begin, end]}
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # the tensors begin aligned
    digest = hashlib.sha256()
    with open(path, 'xb') as file:
        def put(content):
            file.write(content)
            digest.update(content)

        put(len(text).to_bytes(8, 'little'))
        put(text)
        for name, shape in shapes.items():
            tensor = make(name)
            assert tuple(tensor.shape) == tuple(shape), (name, tensor.shape)
            tensor = tensor.detach().to('cpu', dtype).contiguous()
            put(memoryview(tensor.view(-1).view(torch.uint8).numpy()))
        file.flush()
        os.fsync(file.fileno())
    return {'bytes': path.stat().st_size, 'sha256': digest.hexdigest()}


def write_shards(folder: Path, shapes: dict, max_shard_size: str,
                 dtype: torch.dtype, make, index: str | None = None) -> dict:
    """Write {name: shape} to model.safetensors, or to shards of a size such
    as 5GB, with a file named `index` that tells where each tensor lies.

    `make` is that of write_tensors. Returns {file: {'bytes', 'sha256'}}.
    Raises TensorFileError for a value that is not finite in `dtype`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(shape, dtype=dtype, device='meta')
         for name, shape in shapes.items()}, max_shard_size=max_shard_size)
    files = {}
    with tqdm(total=len(shapes), unit='weight', disable=None) as bar:
        def checked(name):
            bar.update()
            tensor = make(name).to(dtype)
            if problem := not_finite(name, tensor):
                raise TensorFileError(
                    f"{problem} in {str(dtype).removeprefix('torch.')}: give "
                    '--dtype bfloat16 or float32')
            return tensor

        for file, names in plan.filename_to_tensors.items():
            files[file] = write_tensors(
                folder / file, {name: shapes[name] for name in names}, dtype,
                checked)
    if index and plan.is_sharded:
        write_json(folder / index, {'metadata': plan.metadata,
                                    'weight_map': plan.tensor_to_filename})
    return files


class FolderTensors:
    """The tensors of a folder's model.safetensors, in shards or in one.

    `shapes` {name: shape}. Raises TensorFileError, with all that is wrong,
    for files that are absent, cut off or damaged, and for an index that does
    not fit them.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.shapes, self._files, problems = {}, {}, []
        promised = self._index()
        files = (sorted(set(promised.values())) if promised is not None
                 else [SINGLE])
        for name in files:
            try:
                self._list(name)
            except (OSError, SafetensorError, TensorFileError) as error:
                problems.append(f'{name}: {error}')
        if promised is not None and not problems:
            problems = [
                f'{INDEX} names {name} in {file}, where it is not'
                for name, file in promised.items()
                if self._files.get(name) != file]
        if problems:
            raise TensorFileError(
                f'the weights of {self.folder} cannot be read; fetch or copy '
                'it again:\n' + '\n'.join(f'  {p}' for p in problems))

    def _index(self) -> dict | None:
        """{name: file} of the index, if there is one."""
        path = self.folder / INDEX
        if path.exists():
            try:
                names = json.loads(path.read_text())['weight_map']
                if all(file == Path(file).name for file in names.values()):
                    return names
                problem = 'it names a file outside the folder'
            except (OSError, ValueError, KeyError, TypeError,
                    AttributeError) as error:
                problem = f'{type(error).__name__}: {error}'
            raise TensorFileError(f'{path} is no index of weights: {problem}')
        if (self.folder / SINGLE).exists():
            return None
        pickled = sorted(p.name for p in self.folder.glob('*.bin'))
        raise TensorFileError(
            f'{self.folder} has neither {SINGLE} nor {INDEX}' + (
                f'; its {pickled[0]} is pickled, which may run code and is '
                'not read: convert it where you trust it, with transformers '
                'save_pretrained(..., safe_serialization=True)'
                if pickled else ''))

    def _list(self, name: str):
        path = self.folder / name
        if not path.exists():
            raise TensorFileError('is missing')
        with safe_open(path, 'pt') as file:
            for key in file.keys():  # noqa: SIM118, not a dict
                part = file.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    raise TensorFileError(
                        f'{key} is of type {part.get_dtype()}; weights must '
                        f'be one of {", ".join(DTYPES)}, not quantized')
                if key in self._files:
                    raise TensorFileError(
                        f'{key} is in {self._files[key]} as well')
                self.shapes[key] = tuple(part.get_shape())
                self._files[key] = name

    def __contains__(self, name):
        return name in self._files

    def __iter__(self):
        return iter(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read from disk; its memory is the file's until it is let go."""
        with safe_open(self.folder / self._files[name], 'pt') as file:
            return file.get_tensor(name)


def not_finite(name: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with a tensor that holds NaN or infinity."""
    # they survive a sum, which takes no memory; whether it has only
    # overflowed, the second test tells
    if tensor.sum().isfinite() or tensor.isfinite().all():
        return None
    wrong = (~tensor.isfinite()).flatten().nonzero()
    first = int(wrong[0])
    return (f'{len(wrong):,} of the {tensor.numel():,} values of {name} are '
            f'NaN or infinite, the first, {tensor.flatten()[first].item()}, '
            f'at {first}')
