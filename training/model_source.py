"""Finding a trained or published model: configuration, weights, tokenizer.

    python -c "from training.model_source import open_model; \
        found = open_model('out-quickstart'); print(found.source)"

A model is named by an out_dir (its newest run), a run folder, a checkpoint
folder (of a run, or one that hf_convert.py imported), a Hugging Face folder,
or hf:NAME for one of the hub.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model_builder import ConfigurableGPT
from model_components import build_rope
from model_config import ModelArchitectureConfig
from training.checkpoint import (
    Tensors,
    check_shapes,
    find_checkpoint,
    read_state,
    verify_checkpoint,
)
from training.dataset import open_dataset
from training.hf_folder import (
    HUB,
    eot_of,
    locate,
    open_hf_folder,
    read_hf_config,
)
from training.run_log import RunError, read_record, resolve_run


class SourceError(ValueError):
    """A path that names no model, or one without what is asked for."""


class NoTokenizer(SourceError):
    """A model without a tokenizer: its ids cannot be read as text."""


@dataclass(frozen=True)
class Source:
    """Where a model was found; nothing but small files has been read."""

    kind: str       # 'run', 'imported' or 'huggingface'
    folder: Path    # the checkpoint folder, or the Hugging Face folder
    config: ModelArchitectureConfig
    run: Path | None      # the run folder, of kind 'run'
    record: dict | None   # its run.json
    state: dict | None    # state.json of a checkpoint

    def __str__(self):
        return f'{self.folder} ({self.kind})'


@dataclass(frozen=True)
class OpenModel:
    model: ConfigurableGPT  # in evaluation mode, on the device asked for
    tokenizer: Tokenizer | None  # None: the model has none
    eot_id: int | None      # ends a document; None without a tokenizer
    source: Source

    @property
    def start_id(self) -> int:
        """What a document begins after: in training the end of the one
        before; elsewhere what the tokenizer puts first, if anything."""
        first = [] if self.source.run else self.tokenizer.encode('').ids
        return first[0] if first else self.eot_id


def open_model(path, device='cpu', *, needs_text=True,
               **overrides) -> OpenModel:
    """The model that `path` names, with weights in float32.

    With `needs_text`, one without a tokenizer is an error. `overrides` are
    fields of the architecture that do not change the weights, e.g.
    attention_backend='sdpa'. Raises ValueError (SourceError, RunError,
    CheckpointError, DatasetError, ConversionError, TensorFileError) that says
    what is absent, damaged or does not fit.
    """
    source = find_source(path, **overrides)
    try:  # before much is read
        folder, eot_id = find_tokenizer(source)
        tokenizer = read_tokenizer(folder, source.config.vocab_size)
    except NoTokenizer:
        if needs_text:
            raise
        tokenizer = eot_id = None
    model = build_empty(source.config, device)
    fill(model, open_weights(source, model))
    return OpenModel(model.eval(), tokenizer, eot_id, source)


def find_source(path, **overrides) -> Source:
    """What `path` names; see open_model for the overrides and errors."""
    text = str(path)
    folder = Path(text).expanduser()
    if text.startswith(HUB) or (folder / 'config.json').exists():
        folder = locate(text.removeprefix(HUB))
        config, _, _ = open_hf_folder(folder, **overrides)
        return Source('huggingface', folder, config, None, None, None)
    if (folder / 'state.json').exists():
        checkpoint = folder
    else:
        try:
            run = resolve_run(folder)
        except RunError as error:
            raise SourceError(
                f'{error}; or a checkpoint, a folder of Hugging Face or '
                'hf:NAME') from error
        checkpoint = find_checkpoint(run)
    state = read_state(checkpoint)
    config = ModelArchitectureConfig.from_dict(
        state['architecture'] | overrides)
    if state.get('imported'):
        return Source('imported', checkpoint, config, None, None, state)
    # `latest` is a link, and a run may be moved: by the folder it lies in
    run = checkpoint.resolve().parent.parent
    return Source('run', checkpoint, config, run, read_record(run), state)


def open_weights(source: Source, model):
    """The weights of a source by name and range, as `model` needs them; of a
    checkpoint every byte has been verified."""
    if source.kind == 'huggingface':
        return open_hf_folder(source.folder)[1]
    state = verify_checkpoint(source.folder)
    tensors = Tensors(source.folder, state, 'model')
    check_shapes(source.folder, model, tensors, state)
    return tensors


@torch.no_grad()
def fill(model: ConfigurableGPT, weights):
    """Read every parameter from `weights`, by name and range."""
    for name, p in model.named_parameters():
        weights.read(name, 0, p.view(-1))


def find_tokenizer(source: Source) -> tuple[Path, int]:
    """(the folder with its tokenizer.json, the id that ends a document).

    Raises NoTokenizer, and SourceError where a run's dataset has another
    tokenizer by now.
    """
    if source.kind == 'huggingface':
        folder = source.folder
        path = folder / 'tokenizer.json'
        if not path.exists():
            raise NoTokenizer(
                f'{folder} has no tokenizer.json; make one with '
                'transformers: AutoTokenizer.from_pretrained(...)'
                '.save_pretrained(...)')
        eot_id = eot_of(
            read_hf_config(folder),
            read_tokenizer(folder, source.config.vocab_size).get_vocab())
    elif source.kind == 'imported':
        record = source.state['imported']['tokenizer']
        if record is None:
            raise NoTokenizer(f'{source.folder} was imported from a model '
                              'without a tokenizer')
        folder, eot_id = source.folder / record['path'], record['eot_id']
    else:
        recorded = source.record['dataset']
        data = open_dataset(recorded['folder'])
        if data.tokenizer_folder is None:
            raise NoTokenizer(
                f'the dataset {data.folder} has no tokenizer, so that its '
                'ids cannot be read as text')
        was, now = recorded['tokenizer'], data.meta['tokenizer']
        if was['sha256'] != now['sha256']:
            raise SourceError(
                f'the dataset {data.folder} has another tokenizer than when '
                f'{source.run} was trained on it: {now["name"]}, SHA-256 '
                f'{now["sha256"]}; then {was["name"]}, {was["sha256"]}: put '
                'the dataset of the run back there')
        folder, eot_id = data.tokenizer_folder, data.eot_id
    if eot_id is None:
        raise NoTokenizer(
            f'nothing tells which id ends a document in {folder}: set '
            'eos_token_id in its config.json')
    return folder, eot_id


def read_tokenizer(folder, vocab_size: int) -> Tokenizer:
    """The tokenizer.json of a folder; SourceError where it is absent or
    damaged, or has ids for which the model has no row."""
    path = Path(folder) / 'tokenizer.json'
    if not path.is_file():
        raise SourceError(f'{path} is missing')
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises Exception itself
        raise SourceError(f'{path} cannot be read: {error}') from error
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= vocab_size:
        raise SourceError(
            f'{path} has ids up to {largest}, the model has {vocab_size} '
            'rows: it is the tokenizer of another model')
    return tokenizer


def build_empty(config, device) -> ConfigurableGPT:
    """A model whose weights are yet to be filled in: drawing 0.6 billion
    numbers takes ten seconds."""
    with torch.device('meta'):
        model = ConfigurableGPT(config)
    model = model.to_empty(device=device)
    if config.weight_tying:
        model.lm_head.weight = model.wte.weight
    rope = build_rope(config)  # its tables are no weights
    model.rope = None if rope is None else rope.to(device)
    return model
