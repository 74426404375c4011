"""From options to a job that is ready to train, all checks first.

Nothing is created before every option, the dataset and the device have been
checked on every rank, and an existing run is touched only once it is known to
fit.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import sys
from pathlib import Path

import torch

from model_builder import ConfigurableGPT
from model_config import ModelArchitectureConfig
from training.checkpoint import (
    CheckpointError,
    find_checkpoints,
    load_checkpoint,
    load_published,
    note_val_loss,
    save_checkpoint,
    verify_checkpoint,
)
from training.configurator import ConfigError, configure
from training.data_loader import EvalSet, TrainLoader
from training.dataset import Dataset, open_dataset
from training.distributed import (
    OtherRankFailed,
    Ranks,
    all_or_none,
    broadcast_text,
    contact,
    join,
    leave,
    on_main,
    ranks_of_environment,
    set_timeout,
    values_of_ranks,
)
from training.durable import is_held
from training.hf_folder import HUB
from training.initial_model import (
    adopt_architecture,
    check_vocabulary,
    find_published,
)
from training.model_source import open_weights
from training.record import compare_with_record, make_record, print_report
from training.run_log import (
    Run,
    RunError,
    SilentRun,
    read_metrics,
    read_record,
    resolve_run,
)
from training.settings import resolve
from training.strategies import Replicated, build_strategy

# with other values of these, init_from='auto' goes on with a run all the same
FREE_WHEN_RESUMED = ('init_from', 'dist_timeout_s', 'step_timeout_s',
                     'profile', 'dry_run')
PLACE_OPTIONS = ('init_from', 'out_dir')  # where to start, not what to do
HF_FOLDER = 'hf'  # of a run, for export_hf_at_end


@dataclasses.dataclass
class Job:
    """Everything that the training loop works with."""

    options: dict
    ranks: Ranks
    config: ModelArchitectureConfig
    device: torch.device
    dtype: str             # what the matmuls really run in
    activation_checkpointing: str  # what really runs
    run: Run | SilentRun   # the latter on ranks other than 0
    model: torch.nn.Module
    strategy: Replicated   # or a subclass; owns the optimizer
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
    saved_step: int | None  # of the checkpoint that holds the model as it is

    def __post_init__(self):
        self.evaluated_steps = {r['step'] for r in self.records
                                if r['kind'] == 'eval'}
        self.at_exit = contextlib.ExitStack()

    def evaluated_at(self, step: int) -> bool:
        return step in self.evaluated_steps

    def expect_steps(self):
        """Ranks that compute the same: none is long behind the others."""
        set_timeout(min(self.options['step_timeout_s'],
                        self.options['dist_timeout_s']))

    def expect_delays(self):
        """One rank may compile, read or write for long while others wait."""
        set_timeout(self.options['dist_timeout_s'])

    def save(self, step: int, val_loss: float | None = None):
        self.expect_delays()
        if step == self.saved_step:
            # written again, it would be away for a moment
            if val_loss is not None:
                on_main(self.ranks, note_val_loss, self.run.folder
                        / 'checkpoints' / f'step_{step:08d}', val_loss)
            return
        save_checkpoint(self.run.folder, self.strategy, step=step,
                        val_loss=val_loss,
                        keep=self.options['keep_checkpoints'])
        self.saved_step = step

    def export_hf(self, say) -> bool:
        """The last checkpoint into hf/ of the run folder, by rank 0.

        False where that fails, which is no fault of the training; `say` is
        called with what was written, stderr has what was not.
        """
        from training.hf_export import export_model  # loads slowly
        self.expect_delays()
        run, folder = self.run.folder, self.run.folder / HF_FOLDER
        try:
            on_main(self.ranks, export_model, run / 'checkpoints'
                    / f'step_{self.max_iters:08d}', folder)
        except OtherRankFailed:
            return False
        except (ValueError, OSError) as error:
            print('error: training has finished and its checkpoint is saved, '
                  f'but the export to {folder} failed: {error}\nOnce this is '
                  f'mended: python hf_convert.py export {run} {folder}',
                  file=sys.stderr)
            return False
        say(f'exported: {folder}')
        return True

    def __enter__(self):
        return self

    def __exit__(self, kind, error, _):
        self.at_exit.close()
        self.loader.close()
        with contextlib.suppress(OSError):  # of a full disk, which `error` is
            if error is not None and kind is not SystemExit:
                self.run.append('end', step=getattr(error, 'step', None),
                                status='failed',
                                reason=f'{kind.__name__}: {error}')
            self.run.close()
        self.strategy.close()
        self.model = self.strategy = None  # nothing may hold the group
        leave(error)


@contact()
def start(namespace: dict, source_path, argv: list[str], stop) -> Job:
    """Read the options, check everything, build the job, print the report.

    Writes the options into `namespace`. Raises ValueError (ConfigError,
    DatasetError, RunError, CheckpointError) with every problem found,
    OtherRankFailed where another rank did, and Stopped for a signal to some
    rank (`stop`, StopSignals).
    """
    ranks = ranks_of_environment()
    parsed, resumed, published = settle_options(
        namespace, source_path, argv, ranks)
    checked = all_or_none(check, parsed, resumed, published, argv, ranks)
    all_or_none(check_equal_on_ranks, checked.record)
    stop.check()
    if parsed.values['dry_run']:
        if ranks.is_main:
            from training.planning import print_dry_run
            print_dry_run(parsed.values, checked.plan, checked.dataset,
                          ranks.world_size)
        leave()
        raise SystemExit(0)
    prepare_device(parsed.values, checked.plan['device'])
    checkpoint, state = choose_checkpoint(parsed.values, resumed, ranks, stop)
    strategy = build_model(parsed.values, checked, ranks)
    stop.check()
    start_step = load_weights(strategy, checkpoint, state, resumed, published,
                              stop)
    check_updates(start_step, checked.plan['max_iters'], resumed)
    # the run folder comes last: what failed above has written nothing
    run, records = open_run(resumed, start_step, parsed, checked.record, ranks)
    if ranks.is_main:
        print_report(checked.record, run, checked.plan, start_step)
    return build_job(parsed.values, checked, strategy, run, records,
                     start_step, saved_step=start_step if resumed else None)


def settle_options(namespace, source_path, argv, ranks):
    """(options, the run folder to continue, the model to begin from), the
    last two None where there is none; the ranks have met."""
    parsed = configure(namespace, source_path, argv)
    join(ranks, timeout_of(parsed))
    resumed = find_resumed(parsed.values, ranks)
    if resumed:
        return all_or_none(lambda: configure(
            namespace, source_path, argv,
            base=recorded_options(resumed, parsed))), resumed, None
    published = find_published(parsed.values['init_from'], ranks)
    if published is not None:
        all_or_none(adopt_architecture, parsed, published)
        namespace.update(parsed.values)
    return parsed, None, published


@dataclasses.dataclass
class Checked:
    """What the options come to, once nothing is wrong with them."""

    dataset: Dataset
    plan: dict  # of settings.resolve
    eval_set: EvalSet
    record: dict  # run.json, without what the built model tells


def check(parsed, resumed, published, argv, ranks) -> Checked:
    options = parsed.values
    dataset = open_dataset(options['dataset'])
    if published is not None:
        check_vocabulary(published, dataset)
    plan = resolve(options, dataset, ranks)
    eval_set = EvalSet(
        dataset.split('val'), eval_bytes=plan['eval_bytes'],
        block_size=plan['config'].block_size, eot_id=dataset.eot_id)
    record = make_record(parsed, plan, dataset, eval_set, argv, ranks)
    if resumed:
        compare_with_record(read_record(resumed), record)
        check_export(options, resumed)
    return Checked(dataset, plan, eval_set, record)


def prepare_device(options, device):
    if options['deterministic']:
        torch.use_deterministic_algorithms(True)
        # cuBLAS gives the same bits only with workspaces of a fixed size,
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    if device.type == 'cuda':
        torch.cuda.set_device(device)


def build_model(options, checked: Checked, ranks) -> Replicated:
    """The model within its strategy; notes its size in the record."""
    torch.manual_seed(options['seed'])
    plan = checked.plan
    model = ConfigurableGPT(plan['config']).to(plan['device'])
    checked.record['parameters'] = {
        'total': model.get_num_params(),
        'non_embedding': model.get_num_params(non_embedding=True)}
    strategy = build_strategy(
        model, ranks, dict(
            learning_rate=options['learning_rate'],
            weight_decay=options['weight_decay'],
            betas=(options['beta1'], options['beta2']),
            eps=options['adam_eps']),
        use_zero1=options['use_zero1'], use_fsdp=options['use_fsdp'],
        reshard_after_forward=options['fsdp_reshard_after_forward'],
        dtype=plan['dtype'][0], device=plan['device'])
    checked.record['optimizer_bytes_per_rank'] = [
        int(n) for n in values_of_ranks(strategy.optimizer_bytes)]
    return strategy


def load_weights(strategy, checkpoint, state, resumed, published,
                 stop) -> int:
    """Those to begin with, if not the drawn ones; the updates made so far."""
    if checkpoint is not None:
        state = load_checkpoint(checkpoint, strategy, stop=stop, state=state,
                                with_optimizer=bool(resumed))
        return state['step'] if resumed else 0
    if published is not None:
        load_published(all_or_none(open_weights, published, strategy.model),
                       strategy, stop)
    return 0


def check_updates(start_step: int, max_iters: int, resumed):
    if start_step > max_iters:
        raise ConfigError([
            f'max_iters={max_iters}: {resumed} has made {start_step} updates '
            'already; set at least as many, or start a new run with '
            '--init_from=scratch'])


def build_job(options, checked, strategy, run, records, start_step,
              saved_step) -> Job:
    plan, ranks = checked.plan, strategy.ranks
    loader = TrainLoader(
        checked.dataset.split('train'), block_size=plan['config'].block_size,
        batch_size=options['batch_size'], accumulation=plan['accumulation'],
        seed=options['seed'], rank=ranks.rank, world_size=ranks.world_size,
        start_step=start_step, device=plan['device'])
    return Job(
        options=options, ranks=ranks, config=plan['config'],
        device=plan['device'], dtype=plan['dtype'][0],
        activation_checkpointing=plan['recomputation'][0], run=run,
        model=strategy.model, strategy=strategy, loader=loader,
        eval_set=checked.eval_set, max_iters=plan['max_iters'],
        schedule=plan['schedule'], accumulation=plan['accumulation'],
        tokens_per_iter=plan['tokens_per_iter'], start_step=start_step,
        best_val_loss=min((r['val_loss'] for r in records
                           if r['kind'] == 'eval'
                           and r['val_loss'] is not None), default=math.inf),
        record=checked.record, records=records, saved_step=saved_step)


def check_equal_on_ranks(record: dict):
    """All ranks must have been given the same options and data."""
    essential = {key: record[key] for key in
                 ('options', 'architecture', 'dataset', 'schedule')}
    text = json.dumps(essential, sort_keys=True)
    # 48 bits, which a float64 holds exactly
    digest = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16)
    digests = values_of_ranks(digest)
    other = [rank for rank, d in enumerate(digests) if d != digests[0]]
    if other:
        raise ConfigError([f'rank(s) {", ".join(map(str, other))} differ from '
                           'rank 0 in options or dataset: start all with the '
                           'same command and data'])


# --- which run and checkpoint to go on with --------------------------------


def timeout_of(parsed) -> float:
    """dist_timeout_s, before the ranks have met: as given, or as recorded in
    the run to resume, so far as this rank can read it."""
    options = parsed.values
    if options['init_from'] == 'resume' and (
            'dist_timeout_s' not in parsed.given):
        with contextlib.suppress(RunError):  # told when the ranks have met
            run = resolve_run(options['out_dir'])
            options = options | recorded_options(run, parsed)
    return options['dist_timeout_s']


def find_resumed(options: dict, ranks: Ranks) -> Path | None:
    """The run folder to continue, as rank 0 sees it; None to start anew."""
    def find():
        found = None
        if options['init_from'] == 'resume':
            found = resolve_run(options['out_dir'])
        elif options['init_from'] == 'auto':
            found = unfinished_run(options)
        if found and is_held(found):
            Run(found)  # raises the error that names the holder
        return found

    text = broadcast_text(str(on_main(ranks, find) or ''))
    return Path(text) if text else None


def recorded_options(run: Path, parsed) -> dict:
    """A run's options, to stand in place of the defaults: so that
    `--init_from=resume --out_dir=...` alone continues it as it was."""
    return {k: v for k, v in read_record(run)['options'].items()
            if k in parsed.values and k not in PLACE_OPTIONS}


def check_export(options: dict, run: Path):
    """ConfigError where the export at the end would find its place taken."""
    folder = run / HF_FOLDER
    if options['export_hf_at_end'] and folder.exists():
        raise ConfigError([
            f'export_hf_at_end=True: {folder} exists and is not overwritten; '
            'move it away, or give --export_hf_at_end=False'])


def unfinished_run(options: dict) -> Path | None:
    """The newest run of out_dir, if its options are these and it has a
    checkpoint but not all of its updates."""
    try:
        run = resolve_run(options['out_dir'])
    except RunError:
        return None
    recorded, asked = ({k: v for k, v in found.items()
                        if k not in FREE_WHEN_RESUMED}
                       for found in (read_record(run)['options'], options))
    if recorded != asked:
        return None
    records, _ = read_metrics(run)
    finished = any(r['kind'] == 'end' and r['status'] == 'finished'
                   for r in records)
    checkpoints = list((run / 'checkpoints').glob('step_*'))
    return run if checkpoints and not finished else None


def choose_checkpoint(options, resumed, ranks, stop):
    """(checkpoint to begin with, its state.json if it has been verified): the
    newest; under init_from='auto' the newest that is whole."""
    if not resumed and (options['init_from'] in ('scratch', 'auto')
                        or options['init_from'].startswith(HUB)):
        return None, None
    source = resumed or all_or_none(_run_or_checkpoint, options['init_from'])
    # as rank 0 sees them: a shared file system may be behind on another node
    found = on_main(ranks, find_checkpoints, source)
    found = [Path(p) for p in broadcast_text(
        '\n'.join(map(str, found or []))).splitlines()]
    if options['init_from'] != 'auto':
        return found[0], None
    for checkpoint in found:
        try:
            return checkpoint, verify_checkpoint(checkpoint, ranks, stop)
        except CheckpointError as error:
            print(f'warning: {error}. Trying the one before', file=sys.stderr)
        except OtherRankFailed:
            pass  # the rank that found the damage says so
    raise CheckpointError(f'{source}: no checkpoint is whole; start anew with '
                          '--init_from=scratch')


def _run_or_checkpoint(path) -> Path:
    if (Path(path) / 'state.json').exists():
        return Path(path)
    try:
        return resolve_run(path)
    except RunError as error:
        raise RunError(f"init_from={path}: not 'scratch', 'resume', 'auto' "
                       f'or hf:NAME, and {error}') from error


def open_run(resumed, start_step, parsed, record, ranks):
    """(run, its metrics so far): a new folder, or the resumed one."""
    spread = {key: record[key]
              for key in ('world_size', 'strategy', 'device')}

    def opened():
        records = []
        if resumed:
            run = Run.reopen(resumed)
            was = read_record(resumed)['options']
            run.append(
                'resume', step=start_step, **spread,
                max_iters=record['max_iters'], schedule=record['schedule'],
                options={k: v for k, v in record['options'].items()
                         if k not in PLACE_OPTIONS and v != was.get(k)})
            records, _ = read_metrics(resumed)
        else:
            run = Run.create(parsed.values['out_dir'])
            run.write_record(record)
            run.append('start', step=0, **spread)
        return run, records

    run, records = on_main(ranks, opened) or (None, [])
    folder = broadcast_text(str(run.folder) if run else '')
    if not ranks.is_main:
        run = SilentRun(folder)
    # what the loop decides by must be the same on all ranks, and a shared
    # file system may be behind on another node
    trained = [r for r in records if r['kind'] == 'train'][-1:]
    records = trained + [r for r in records
                         if r['kind'] in ('eval', 'skipped')]
    return run, json.loads(broadcast_text(json.dumps(records)))
