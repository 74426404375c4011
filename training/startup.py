"""From options to a job that is ready to train, all checks first.

Nothing is created before every option, the dataset and the device have been
checked, and an existing run is touched only once it is known to fit.
"""

import dataclasses
import math
import os
import textwrap
from pathlib import Path

import torch

from model_builder import ConfigurableGPT
from model_components import attention_in_use
from model_config import (
    ModelArchitectureConfig,
    get_preset_config,
    options_without_effect,
)
from training.checkpoint import (
    find_checkpoint,
    load_checkpoint,
    read_state,
    save_checkpoint,
)
from training.configurator import ConfigError, configure
from training.data_loader import EvalSet, TrainLoader
from training.dataset import Dataset, open_dataset
from training.device import (
    DTYPES,
    check_compiler,
    computing_dtype,
    device_name,
    resolve_device,
)
from training.flops import flops_per_token, peak_tflops_of
from training.optimizer import build_optimizer
from training.run_log import (
    Run,
    RunError,
    is_running,
    read_metrics,
    read_record,
    resolve_run,
    source_commit,
    versions,
)

ARCHITECTURE_OPTIONS = tuple(
    field.name for field in dataclasses.fields(ModelArchitectureConfig))

EVAL_BYTES = 1_000_000
CPU_EVAL_BYTES = 20_000  # more takes a large model longer than its training
# architecture fields that change how the model computes, not what
FREE_FIELDS = ('attention_backend',)


@dataclasses.dataclass
class Job:
    """Everything that the training loop works with."""

    options: dict
    config: ModelArchitectureConfig
    dataset: Dataset
    device: torch.device
    dtype: str             # what the matmuls really run in
    run: Run
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loader: TrainLoader
    eval_set: EvalSet
    max_iters: int
    schedule: dict         # arguments of learning_rate_at
    accumulation: int      # micro-steps per update in this process
    tokens_per_iter: int   # over all processes
    start_step: int
    best_val_loss: float   # so far, inf before the first evaluation
    record: dict           # run.json
    records: list[dict]    # metrics of a resumed run so far

    def save(self, step: int, val_loss: float | None = None):
        save_checkpoint(self.run.folder, self.model, self.optimizer,
                        step=step, val_loss=val_loss,
                        keep=self.options['keep_checkpoints'])

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.loader.close()
        if error is not None and kind is not SystemExit:
            self.run.append('end', step=None, status='failed',
                            reason=f'{kind.__name__}: {error}')
        self.run.close()


def start(namespace: dict, source_path, argv: list[str]) -> Job:
    """Read the options, check everything, build the job, print the report.

    Writes the options into `namespace`. Raises ValueError (ConfigError,
    DatasetError, RunError, CheckpointError) with every problem found.
    """
    parsed, resumed = read_options(namespace, source_path, argv)
    options = parsed.values
    if int(os.environ.get('WORLD_SIZE', 1)) > 1:
        raise ConfigError(['training in several processes is not available '
                           'in this version: start train.py without '
                           'torchrun'])
    dataset = open_dataset(options['dataset'])
    plan = resolve(options, dataset)
    config, device = plan['config'], plan['device']

    train_split, val_split = dataset.split('train'), dataset.split('val')
    eval_set = EvalSet(val_split, eval_bytes=plan['eval_bytes'],
                       block_size=config.block_size, eot_id=dataset.eot_id)
    record = make_record(parsed, plan, dataset, eval_set, argv)
    weights = None
    if resumed:
        compare_with_record(read_record(resumed), record)
        weights = find_checkpoint(resumed)
    elif options['init_from'] not in ('scratch', 'auto'):
        weights = find_checkpoint(_run_or_checkpoint(options['init_from']))

    torch.manual_seed(options['seed'])
    model = ConfigurableGPT(config).to(device)
    record['parameters'] = {
        'total': model.get_num_params(),
        'non_embedding': model.get_num_params(non_embedding=True)}
    optimizer = build_optimizer(
        model, learning_rate=options['learning_rate'],
        weight_decay=options['weight_decay'],
        betas=(options['beta1'], options['beta2']), eps=options['adam_eps'])
    start_step = 0
    if weights is not None:
        state = load_checkpoint(weights, model, optimizer if resumed else None)
        start_step = state['step'] if resumed else 0

    # the run folder comes last: what failed above has written nothing
    records = []
    if resumed:
        run = Run.reopen(resumed)
        run.append('resume', step=start_step, options_given=parsed.given)
        records, _ = read_metrics(resumed)
    else:
        run = Run.create(options['out_dir'])
        run.write_record(record)
    loader = TrainLoader(
        train_split, block_size=config.block_size,
        batch_size=options['batch_size'], accumulation=plan['accumulation'],
        seed=options['seed'], start_step=start_step, device=device)
    print_report(record, run, plan, start_step)
    return Job(
        options=options, config=config, dataset=dataset, device=device,
        dtype=plan['dtype'][0], run=run, model=model, optimizer=optimizer, loader=loader,
        eval_set=eval_set, max_iters=plan['max_iters'],
        schedule=plan['schedule'], accumulation=plan['accumulation'],
        tokens_per_iter=plan['tokens_per_iter'], start_step=start_step,
        best_val_loss=min((r['val_loss'] for r in records
                           if r['kind'] == 'eval'), default=math.inf),
        record=record, records=records)


def read_options(namespace, source_path, argv):
    """(Parsed, run folder to resume or None).

    A resumed run's recorded options take the place of the defaults, so that
    `--init_from=resume --out_dir=...` alone continues it as it was.
    """
    parsed = configure(namespace, source_path, argv)
    options = parsed.values
    if options['init_from'] == 'resume':
        resumed = resolve_run(options['out_dir'])
    elif options['init_from'] == 'auto':
        resumed = unfinished_run(options)
    else:
        resumed = None
    if resumed:
        if is_running(resumed):
            Run.reopen(resumed)  # raises the error that names the holder
        recorded = read_record(resumed)['options']
        known = {k: v for k, v in recorded.items()
                 if k in parsed.values and k not in ('init_from', 'out_dir')}
        parsed = configure(namespace, source_path, argv, base=known)
    return parsed, resumed


def unfinished_run(options: dict) -> Path | None:
    """The newest run of out_dir, if its options are these and it has a
    checkpoint but not all of its updates."""
    try:
        run = resolve_run(options['out_dir'])
    except RunError:
        return None
    same = {k: v for k, v in options.items() if k != 'init_from'}
    recorded = read_record(run)['options']
    if {k: v for k, v in recorded.items() if k != 'init_from'} != same:
        return None
    records, _ = read_metrics(run)
    finished = any(r['kind'] == 'end' and r['status'] == 'finished'
                   for r in records)
    checkpoints = list((run / 'checkpoints').glob('step_*'))
    return run if checkpoints and not finished else None


def resolve(options: dict, dataset: Dataset) -> dict:
    """What the options come to, or one ConfigError with all that is wrong."""
    problems = []

    def attempt(function, *arguments):
        try:
            return function(*arguments)
        except ValueError as error:
            problems.append(str(error))

    config = attempt(build_architecture, options, dataset)
    device = attempt(resolve_device, options['device'])
    if device is not None and options['compile']:
        attempt(check_compiler, device)
    if options['use_zero1'] and options['use_fsdp']:
        problems.append('use_zero1 and use_fsdp exclude each other: FSDP '
                        'shards the optimizer state too; set one to False')
    plan = {'config': config, 'device': device, 'world_size': 1}
    if config is not None:
        train_tokens = dataset.split('train').tokens
        if train_tokens < config.block_size + 1:
            problems.append(
                f'the training split of {dataset.name} has {train_tokens} '
                f'tokens, a sequence needs block_size + 1 = '
                f'{config.block_size + 1}: set a smaller --block_size')
        plan |= resolve_batch(options, config)
        plan['schedule'] = attempt(resolve_schedule, options,
                                   plan['max_iters'])
    if problems:
        raise ConfigError(problems)
    plan['dtype'] = computing_dtype(device, options['dtype'])
    plan['attention'] = attention_in_use(
        config.attention_backend, device.type, DTYPES[plan['dtype'][0]])
    plan['device_name'] = device_name(device)
    plan['peak_tflops'] = options['peak_tflops'] or peak_tflops_of(
        plan['device_name'], plan['dtype'][0])
    plan['eval_bytes'] = options['eval_bytes'] or (
        CPU_EVAL_BYTES if device.type == 'cpu' else EVAL_BYTES)
    return plan


def build_architecture(options: dict, dataset: Dataset):
    """The configuration that preset, options and dataset ask for."""
    given = {name: options[name] for name in ARCHITECTURE_OPTIONS
             if options[name] is not None}
    overrides = {'vocab_size': dataset.vocab_size} | given
    config = get_preset_config(options['arch_preset'], **overrides)
    problems = options_without_effect(config, set(given))
    n_ids = largest_id(dataset) + 1
    if config.vocab_size < n_ids:
        problems.append(
            f'vocab_size={config.vocab_size} has no row for id {n_ids - 1} '
            f'of {dataset.name}: leave vocab_size out '
            f'({dataset.vocab_size} then) or set at least that')
    if problems:
        raise ValueError('\n  '.join(problems))
    return config


def largest_id(dataset: Dataset) -> int:
    """The largest id of the bins, or that of the tokenizer if not recorded."""
    largest = [file['max_id'] for split in dataset.splits.values()
               for file in split.files]
    if None in largest:
        return dataset.tokenizer_size - 1
    return max(largest)


def resolve_batch(options: dict, config) -> dict:
    accumulation = options['gradient_accumulation_steps']
    tokens_per_iter = options['batch_size'] * accumulation * config.block_size
    max_iters = options['max_iters']
    if options['max_tokens'] is not None:
        max_iters = -(-options['max_tokens'] // tokens_per_iter)
    return {'accumulation': accumulation, 'tokens_per_iter': tokens_per_iter,
            'max_iters': max_iters}


def resolve_schedule(options: dict, max_iters: int) -> dict:
    """Arguments of learning_rate_at: unset ones are derived, all checked."""

    def default(name, value):
        return value if options[name] is None else options[name]

    lr = options['learning_rate']
    decay_iters = default('lr_decay_iters', max_iters)
    schedule = {
        'schedule': options['lr_schedule'], 'learning_rate': lr,
        'min_lr': default('min_lr', lr / 10),
        'warmup_iters': default('warmup_iters', round(0.02 * max_iters)),
        'lr_decay_iters': decay_iters,
        'wsd_decay_iters': default('wsd_decay_iters', decay_iters // 5),
    }
    problems = []
    if schedule['min_lr'] > lr:
        problems.append(f'min_lr={schedule["min_lr"]} is above '
                        f'learning_rate={lr}')
    if schedule['warmup_iters'] > decay_iters:
        problems.append(f'warmup_iters={schedule["warmup_iters"]} is above '
                        f'lr_decay_iters={decay_iters}')
    if options['wsd_decay_iters'] is not None and (
            options['lr_schedule'] != 'wsd'):
        problems.append("wsd_decay_iters has no effect with lr_schedule="
                        f"{options['lr_schedule']!r}")
    if problems:
        raise ValueError('\n  '.join(problems))
    return schedule


def make_record(parsed, plan, dataset, eval_set, argv) -> dict:
    """run.json; the parameters are counted once the model is built."""
    config = plan['config']
    full, causal = flops_per_token(config)
    tokenizer = dataset.meta.get('tokenizer') or {}
    return {
        'command': ['train.py', *argv],
        'options': parsed.values,
        'options_given': parsed.given,
        'arch_preset': parsed.values['arch_preset'],
        'architecture': config.to_dict(),
        'architecture_name': config.get_architecture_name(),
        'flops_per_token': full,
        'flops_per_token_causal': causal,
        'tokens_per_iter': plan['tokens_per_iter'],
        'max_iters': plan['max_iters'],
        'schedule': plan['schedule'],
        'world_size': plan['world_size'],
        'device': plan['device_name'],
        'dtype': plan['dtype'][0],
        'peak_tflops': plan['peak_tflops'],
        'attention': plan['attention'][0],
        'dataset': {
            'name': dataset.name,
            'folder': str(dataset.folder),
            'fingerprint': dataset.fingerprint,
            'vocab_size': dataset.vocab_size,
            'tokenizer': {key: tokenizer.get(key)
                          for key in ('name', 'size', 'sha256')},
            'train_tokens': dataset.split('train').tokens,
            'val_text_sha256': dataset.split('val').text_sha256,
            'eval_bytes_wanted': plan['eval_bytes'],
            'eval_documents': eval_set.documents,
            'eval_bytes': eval_set.bytes,
            'eval_tokens': eval_set.tokens,
            'eval_text_sha256': eval_set.text_sha256,
        },
        'versions': versions(),
        'commit': source_commit(),
    }


def compare_with_record(recorded: dict, now: dict):
    """Raise RunError if a run cannot go on under what is asked for now."""

    def essential(record):
        architecture = {k: v for k, v in record['architecture'].items()
                        if k not in FREE_FIELDS}
        return architecture | {
            'dataset': record['dataset']['name'],
            'the bins of the dataset': record['dataset']['fingerprint'],
            'tokens per update': record['tokens_per_iter'],
            'seed': record['options']['seed']}

    was, is_now = essential(recorded), essential(now)
    problems = [f'{key}: {was[key]} in the run, {is_now[key]} now'
                for key in was if was[key] != is_now[key]]
    if problems:
        raise RunError(
            f'{recorded["run_id"]} cannot be resumed with other essentials:\n'
            + '\n'.join(f'  {p}' for p in problems)
            + '\nLeave these options out, or start a new run with '
            '--init_from=scratch.')


def _run_or_checkpoint(path) -> Path:
    if (Path(path) / 'state.json').exists():
        return Path(path)
    try:
        return resolve_run(path)
    except RunError as error:
        raise RunError(f"init_from={path}: not 'scratch', 'resume' or 'auto', "
                       f'and {error}') from error


def with_reason(choice: tuple[str, str]) -> str:
    """'sdpa (why)' for what runs in place of what was asked for."""
    name, reason = choice
    return name if reason == 'as configured' else f'{name} ({reason})'


def print_report(record, run, plan, start_step):
    """What was built, as opposed to what was asked for."""
    options, data = record['options'], record['dataset']
    parameters = record['parameters']
    tokens = plan['tokens_per_iter'] * plan['max_iters']
    flops = record['flops_per_token']
    sharding = [o for o in ('use_zero1', 'use_fsdp') if options[o]]
    rows = [
        ('run', f'{run.folder}'
                + (f', resumed at step {start_step:,}' if start_step else '')),
        ('architecture', f'{record["arch_preset"]}: '
                         f'{record["architecture_name"]}'),
        ('parameters', f'{parameters["total"]:,} '
                       f'({parameters["non_embedding"]:,} non-embedding)'),
        ('data', f'{data["name"]}: {data["train_tokens"]:,} training tokens, '
                 f'{plan["config"].vocab_size:,} rows'),
        ('evaluation', f'{data["eval_tokens"]:,} tokens'
                       + (f' of {data["eval_documents"]:,} documents, '
                          f'{data["eval_bytes"]:,} bytes'
                          if data['eval_bytes'] else '')),
        ('batch', f'{options["batch_size"]} x {plan["config"].block_size} '
                  f'tokens x {plan["accumulation"]} micro-steps = '
                  f'{plan["tokens_per_iter"]:,} tokens an update'),
        ('budget', f'{plan["max_iters"]:,} updates = {tokens:,} tokens, '
                   f'{tokens / data["train_tokens"]:.2f} epochs'),
        ('FLOPs', f'{flops / 1e9:.4g} G a token '
                  f'({record["flops_per_token_causal"] / 1e9:.4g} G causal), '
                  f'{flops * tokens:.3g} in all'),
        ('device', f'{record["device"]}, '
                   + ('compiled' if options['compile'] else 'not compiled')),
        ('dtype', with_reason(plan['dtype'])),
        ('attention', with_reason(plan['attention'])),
    ]
    if sharding:
        rows.append((sharding[0], 'has no effect: one process has nothing to '
                                  'share'))
    for key, value in rows:
        print(textwrap.fill(value, 80, initial_indent=f'{key:13} ',
                            subsequent_indent=14 * ' ',
                            break_long_words=False, break_on_hyphens=False))
    print(flush=True)
