"""Evaluate a model: bits per byte, perplexity, downstream tasks.

The model is a run, a checkpoint or a Hugging Face folder. What is found is
added to the run's evals.jsonl. See docs/evaluating.md.

    python eval.py out-quickstart
    python eval.py out-quickstart --text README.md TESTING.md --stride 64
    python eval.py out-quickstart --tasks arc_easy,hellaswag --limit 100
"""

import functools
import hashlib
import json as json_format
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from data.corpus_tokenizer import plain_content
from training.configurator import (
    NonNegative,
    Positive,
    configure,
    exit_with,
    read_schema,
)
from training.data_loader import EvalSet
from training.dataset import open_dataset
from training.device import (
    DTYPES,
    computing_dtype,
    device_name,
    resolve_device,
)
from training.durable import write_json
from training.eval_results import append_results, main_metric, plain
from training.evaluation import bits_per_byte, evaluate, stream_nats
from training.model_source import OpenModel, open_model
from training.run_log import source_commit
from training.settings import CPU_EVAL_BYTES, EVAL_BYTES
from training.terminal import format_table, number

# the model; it may be named without --out_dir
out_dir: str = 'out'  # an out_dir (its newest run), a run, a checkpoint, or a
#   Hugging Face folder

# on what; nothing named: the validation split that the run was evaluated on
dataset: str | None = None  # the validation split of data/<dataset> or a path
eval_bytes: Positive | None = None  # of it, the first whole documents; None:
#   the run's, or 1,000,000, on a CPU 20,000
text: list[str] = []  # files of UTF-8 text, each one document
tasks: str | None = None  # of lm-eval, with commas between them

# text
context: Positive | None = None  # tokens of a window; None: block_size
stride: Positive | None = None  # tokens by which it moves; None: half of them

# tasks
limit: Positive | None = None  # the first so many questions of each
num_fewshot: NonNegative | None = None  # answered examples before each;
#   None: the task's own number
include_path: str | None = None  # a folder of further tasks

# results
json: str | None = None  # a file for all of them, unrounded

# system
batch_size: Positive = 8
device: str = 'auto'
dtype: Literal[tuple(DTYPES)] | None = None  # of the matmuls; None: the run's,
#   float32 without a run


@dataclass(frozen=True)
class Subject:
    """A model as it is evaluated; the run that it belongs to, if any."""

    opened: OpenModel
    device: torch.device
    dtype: str

    @property
    def run(self) -> Path | None:
        return self.opened.source.run

    @property
    def window(self) -> int:
        return context or self.opened.model.config.block_size


def main():
    subject, results = None, []
    try:
        try:
            configure(globals(), __file__, spelled_out(sys.argv[1:]))
            documents = read_documents()
            if tasks is not None:
                loaded = load_tasks()
            subject = load()
            if dataset is not None or not (documents or tasks):
                results += labelled(subject, [score_dataset(subject)])
            if documents:
                results += labelled(subject,
                                    score_documents(subject, documents))
            if tasks is not None:
                results += labelled(subject, score_tasks(subject, loaded))
        finally:  # what was found is kept, also where the rest fails
            status = report(subject, results) if results else 0
    except (ValueError, OSError) as error:
        exit_with(error)
    sys.exit(status)


def spelled_out(argv: list[str]) -> list[str]:
    """RUN --name value ... as --out_dir=RUN --name=value ..., which is what
    the configurator reads; --text takes all values up to the next option."""
    options = read_schema(globals(), __file__)
    found, rest = [], list(argv)
    while rest:
        name, equals, value = rest.pop(0).partition('=')
        key = name.removeprefix('--')
        if not name.startswith('-'):
            whole = name + equals + value
            found.append(whole if whole.endswith('.py')
                         else f'--out_dir={whole}')
            continue
        if not equals and key in options:
            count = 0
            while count < len(rest) and not rest[count].startswith('--'):
                count += 1
            count = count if key == 'text' else min(count, 1)
            values, rest = rest[:count], rest[count:]
        elif key == 'text' and not value.startswith('['):
            values = [value]
        else:
            values = None
        if values is None or not values:
            found.append(name + equals + value)
        elif key == 'text':
            found.append(f'{name}={json_format.dumps(values)}')
        else:
            found.append(f'{name}={values[0]}')
    return found


def load() -> Subject:
    target = resolve_device(device)
    opened = open_model(out_dir, target, needs_text=bool(text or tasks))
    size = opened.model.config.block_size
    if context is not None and context > size:
        raise ValueError(f'context={context} exceeds the block_size={size} of '
                         f'{out_dir}: give at most {size}')
    record = opened.source.record or {}
    wanted = dtype or record.get('dtype', 'float32')
    return Subject(opened, target, computing_dtype(target, wanted)[0])


def labelled(subject: Subject, results: list[dict]) -> list[dict]:
    """The results with what they were found with."""
    source = subject.opened.source
    return [{'kind': result['kind'],
             'step': source.state['step'] if source.run else None,
             'model': str(source.folder.resolve()), **result,
             'dtype': subject.dtype,
             'device': device_name(subject.device),
             'commit': source_commit()} for result in results]


# --- a dataset ---------------------------------------------------------------


def score_dataset(subject: Subject) -> dict:
    """The validation split as training evaluates it."""
    known = (subject.opened.source.record or {}).get('dataset', {})
    if dataset is None and not known:
        raise ValueError(f'{out_dir} belongs to no run, and so has no dataset: '
                         'name what to evaluate it on with --dataset, --text '
                         'or --tasks')
    data = open_dataset(dataset or known['folder'])
    if dataset is None and data.fingerprint != known['fingerprint']:
        raise ValueError(f'the dataset {data.folder} has changed since the '
                         f'run; --dataset={data.folder} takes it as it is')
    check_tokenizer(subject, data)
    on_cpu = subject.device.type == 'cpu'
    eval_set = EvalSet(
        data.split('val'), block_size=subject.window, eot_id=data.eot_id,
        eval_bytes=eval_bytes or known.get('eval_bytes_wanted') or (
            CPU_EVAL_BYTES if on_cpu else EVAL_BYTES))
    loss, bpb = evaluate(
        subject.opened.model, eval_set, batch_size=batch_size,
        device=subject.device, dtype=subject.dtype, progress=functools.partial(
            bar, desc=data.name, total=eval_set.n_batches(batch_size)))
    return {'kind': 'validation', 'dataset': data.name,
            'text_sha256': eval_set.text_sha256, 'context': subject.window,
            **figures(loss, bpb, eval_set.tokens, eval_set.bytes)}


def check_tokenizer(subject: Subject, data):
    """ValueError where the ids of a dataset mean something else here."""
    if data.tokenizer_folder is None:  # nanoGPT's format: ids alone
        same = data.vocab_size <= subject.opened.model.config.vocab_size
    else:
        theirs = Tokenizer.from_file(
            str(data.tokenizer_folder / 'tokenizer.json'))
        ours = subject.opened.tokenizer
        same = ours and theirs.get_vocab() == ours.get_vocab()
    if not same:
        other = ('another tokenizer than' if subject.opened.tokenizer else
                 'ids that cannot be compared with those of')
        raise ValueError(
            f'the dataset {data.folder} has {other} {out_dir}: '
            'its ids mean nothing to this model; evaluate on the text itself '
            'with --text, or make the dataset with the model\'s tokenizer')


def figures(loss, bpb, n_tokens, n_bytes) -> dict:
    return {'tokens': n_tokens, 'bytes': n_bytes, 'loss': loss,
            'perplexity': math.exp(loss) if loss < 700 else math.inf,
            'bpb': bpb}


def bar(steps, **options):
    return tqdm(steps, leave=False, disable=None, **options)


# --- files of text -----------------------------------------------------------


def read_documents() -> list[tuple[str, str, bytes]]:
    """(path, text, its bytes) of each file; one ValueError for all that
    cannot be scored."""
    documents, problems = [], []
    for path in text:
        try:
            content = Path(path).read_bytes()
            if not content:
                raise ValueError('is empty: there is nothing to score')
            documents.append((path, content.decode(), content))
        except OSError as error:
            problems.append(f'{path} cannot be read ({error.strerror})')
        except UnicodeDecodeError as error:
            problems.append(f'{path} is no UTF-8 text: byte {error.start} is '
                            f'0x{content[error.start]:02x}; convert it, e.g. '
                            'with iconv -t utf-8')
        except ValueError as error:
            problems.append(f'{path} {error}')
    if problems:
        raise ValueError('\n  '.join(problems))
    return documents


def score_documents(subject: Subject, documents) -> list[dict]:
    """Each file: an end-of-text id, its tokens and another such id, all but
    the first scored once; the bits of that over the bytes of the file.

    As in a dataset, text that looks like a special token is plain text.
    """
    eot = subject.opened.tokenizer.id_to_token(subject.opened.eot_id)
    content = json_format.loads(subject.opened.tokenizer.to_str())
    encode = Tokenizer.from_str(json_format.dumps(
        plain_content(content, eot))).encode
    size = subject.window
    step = stride or max(1, size // 2)
    results = []
    for path, string, content in documents:
        ids = encode(string, add_special_tokens=False).ids
        if not ids:
            raise ValueError(f'{path}: the tokenizer knows nothing of this '
                             'text')
        ids = np.array([subject.opened.start_id, *ids, subject.opened.eot_id])
        nats = stream_nats(
            subject.opened.model, ids, context=size, stride=step,
            batch_size=batch_size, device=subject.device, dtype=subject.dtype,
            progress=functools.partial(bar, desc=path))
        results.append({
            'kind': 'text', 'path': path,
            'sha256': hashlib.sha256(content).hexdigest(),
            'context': size, 'stride': step,
            **figures(nats / (len(ids) - 1), bits_per_byte(nats, len(content)),
                      len(ids) - 1, len(content))})
    return results


# --- downstream tasks --------------------------------------------------------


def load_tasks():
    """The tasks by their names, before anything is computed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise ValueError(f'--tasks needs lm-eval ({error}): pip install -r '
                         'requirements-eval.txt') from error
    from training.lm_eval_adapter import load_tasks
    return load_tasks(tasks.split(','), include_path)


def score_tasks(subject: Subject, loaded) -> list[dict]:
    from training.lm_eval_adapter import Adapter, run_tasks
    adapter = Adapter(
        subject.opened.model, subject.opened.tokenizer,
        eot_id=subject.opened.eot_id, start_id=subject.opened.start_id,
        special_tokens=subject.run is None,
        max_length=subject.window, batch_size=batch_size,
        device=subject.device, dtype=subject.dtype)
    return run_tasks(adapter, loaded, limit=limit, num_fewshot=num_fewshot)


# --- what was found ----------------------------------------------------------


def report(subject: Subject, results: list[dict]) -> int:
    """Print, then write; the exit status, 1 where something is not written."""
    print_tables(results)
    status = 0

    def attempt(write, *arguments):
        nonlocal status
        try:
            write(*arguments)
        except OSError as error:
            status = 1
            print(f'warning: these results are printed only: {error}',
                  file=sys.stderr)

    if subject.run:
        attempt(append_results, subject.run, results)
    if json is not None:
        attempt(write_json, Path(json), [plain(result) for result in results])
    return status


def print_tables(results: list[dict]):
    first = results[0]
    step = '' if first['step'] is None else f', step {first["step"]}'
    print(f'{out_dir}{step}, {first["dtype"]} on {first["device"]}')
    scored = [r for r in results if r['kind'] != 'task']
    if scored:
        print('\n' + format_table(
            ('tokens', 'bytes', 'loss', 'perplexity', 'bits/byte', 'of'),
            [(f'{r["tokens"]:,}', number(r['bytes'], ','),
              f'{r["loss"]:.4f}', f'{r["perplexity"]:.4g}',
              number(r['bpb'], '.4f'),
              r.get('path') or f'{r["dataset"]}, validation')
             for r in scored]))
    asked = [r for r in results if r['kind'] == 'task']
    if asked:
        print('\n' + format_table(
            ('value', '+-', 'questions', 'shots', 'metric', 'task'),
            [(number(value, '.4f'), number(r['stderr'].get(name), '.4f'),
              number(r['questions'], ','), number(r['num_fewshot'], ''),
              name + (' *' if name == main_metric(r) else ''), r['task'])
             for r in asked for name, value in r['metrics'].items()]))
        print('* is shown by compare_architectures.py')


if __name__ == '__main__':
    main()
