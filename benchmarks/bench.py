"""One model on this machine: tokens/s, MFU, peak memory, where the time goes.

Takes train.py's config files and options, and runs train.py's own loop on
random tokens: no dataset is needed, no checkpoint is written. After updates
that compile and warm up, the clock runs over some that nothing disturbs; the
split of the time comes from others, in which the device is waited for at every
boundary. One process, one device.

    python benchmarks/bench.py config/full_qwen3_0.6b.py --batch_size=16
    python benchmarks/bench.py config/quickstart.py --vocab_size=4096
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan import planned_setting  # noqa: E402
from training import startup  # noqa: E402
from training.configurator import ConfigError, exit_with  # noqa: E402
from training.dataset import DatasetWriter  # noqa: E402
from training.device import (  # noqa: E402
    forget_peak,
    resident,
    resolve_device,
    synchronize,
)
from training.distributed import ranks_of_environment  # noqa: E402
from training.memory import memory_plan  # noqa: E402
from training.planning import setting_of  # noqa: E402
from training.stop_signals import NO_STOP  # noqa: E402

TRAIN = ROOT / 'train.py'
PARTS = ('loader', 'forward', 'backward', 'optimizer', 'other')

# a run that neither ends, nor evaluates, nor saves, nor logs
ENDLESS = {
    'max_iters': 10**6, 'max_tokens': None, 'lr_decay_iters': None,
    'eval_interval': 10**6, 'log_interval': 10**6,
    'gradient_log_interval': None, 'checkpoint_interval': None,
    'init_from': 'scratch', 'wandb_log': False, 'profile': False,
    'dry_run': False}


class OutOfMemory(Exception):
    """The device, or the machine, has not as much memory as it takes."""


class Measured(Exception):
    """All updates have been timed: the endless run may end."""


class Stopwatch:
    """Stands between train.py's loop and what the loop calls of its job.

    The first `warmup` updates are not timed, the next `updates` by two
    readings of the clock, and the `split` after them at every boundary.
    """

    def __init__(self, job, warmup, updates, split):
        self.job, self.done = job, 0
        self.first, self.last = warmup, warmup + updates
        self.end = self.last + split
        self.seconds = self.peak = self.reserved = None
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._part = None
        job.evaluated_steps.add(0)  # the loop begins with an update
        strategy, loader = job.strategy, job.loader
        strategy.set_learning_rate = self._before(
            strategy.set_learning_rate, self._begins)
        loader.next_batch = self._before(
            loader.next_batch, lambda: self._goes_on('loader'))
        strategy.clip = self._before(
            strategy.clip, lambda: self._goes_on('optimizer'))
        wrap, drop = strategy.wrap, strategy.drop_gradients

        def timed_wrap(model):
            forward = wrap(model)

            def timed_forward(*arguments, **named):
                self._goes_on('forward')
                result = forward(*arguments, **named)
                self._goes_on('backward')
                return result

            return timed_forward

        def timed_drop():
            drop()
            self._ends()

        strategy.wrap, strategy.drop_gradients = timed_wrap, timed_drop

    @staticmethod
    def _before(function, first):
        def wrapped(*arguments):
            first()
            return function(*arguments)
        return wrapped

    def _goes_on(self, part):
        """From here on the time is that of `part`."""
        if self.done < self.last:
            return
        synchronize(self.job.device)
        now = time.perf_counter()
        if self._part:
            self.parts[self._part] += now - self._begin
        self._part, self._begin = part, now

    def _begins(self):
        if self.done == self.first:
            synchronize(self.job.device)
            forget_peak(self.job.device)
            if self.job.device.type != 'cuda' and sys.platform == 'linux':
                self._resident = resident('VmRSS')
            self._begin = time.perf_counter()
        self._goes_on('other')

    def _ends(self):
        self._goes_on(None)
        self.done += 1
        if self.done == self.last:
            synchronize(self.job.device)
            self.seconds = time.perf_counter() - self._begin
            self._read_memory()
        if self.done == self.end:
            raise Measured

    def _read_memory(self):
        device = self.job.device
        if device.type == 'cuda':
            self.peak = torch.cuda.max_memory_allocated(device)
            self.reserved = torch.cuda.max_memory_reserved(device)
        elif sys.platform == 'linux':
            # weights and moments are there already, with all that Python
            # and the compiler take
            parameters = sum(p.numel() for p in self.job.model.parameters())
            self.peak = (4 * parameters + self.job.strategy.optimizer_bytes
                         + resident('VmHWM') - self._resident)


def write_random_dataset(folder, config, windows):
    """A dataset of `windows` whole windows of random ids."""
    V, T = config.vocab_size, config.block_size
    writer = DatasetWriter(
        folder, name='random', vocab_size=V, source={},
        tokenizer={'name': 'none', 'size': V, 'sha256': '0' * 64,
                   'eot_id': 0, 'eot_token': '', 'path': None})
    random = np.random.default_rng(0)
    for split, tokens in (('train', windows * T), ('val', T)):
        writer.add(split, random.integers(0, V, tokens), tokens,
                   hashlib.sha256(split.encode()).digest())
    writer.close()


def load_training_script():
    """train.py as a module, which has not run."""
    spec = importlib.util.spec_from_file_location('training_script', TRAIN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def built_on(device):
    """Weights are drawn where they will be: a processor takes 17 s for those
    of 1.7 billion."""
    build = startup.ConfigurableGPT

    def built(config):
        with torch.device(device):
            return build(config)

    with patch.object(startup, 'ConfigurableGPT',
                      built if device.type == 'cuda' else build):
        yield


def measure(argv, *, warmup=3, updates=10, split=3):
    """What a run with train.py's arguments `argv` does here, as a dict.

    Raises ConfigError for wrong options and OutOfMemory.
    """
    if ranks_of_environment().world_size > 1:
        raise ConfigError(['bench.py measures one process: start it without '
                           'torchrun'])
    if min(warmup, updates, split) < 1:
        raise ConfigError(['warmup, updates and split are at least 1'])
    config, run, _ = planned_setting(argv, 1)
    device = resolve_device(run['options']['device'])
    script = load_training_script()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_random_dataset(folder / 'random', config,
                             max(64, 4 * run['options']['batch_size']))
        options = ENDLESS | {'dataset': folder / 'random',
                             'out_dir': folder / 'out'}
        given = [f'--{name}={value}' for name, value in options.items()]
        try:
            with contextlib.redirect_stdout(sys.stderr), built_on(device):
                job = startup.start(vars(script), str(TRAIN),
                                    [*argv, *given], NO_STOP)
                watch = Stopwatch(job, warmup, updates, split)
                with contextlib.suppress(Measured), job:
                    script.train(job, NO_STOP)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise OutOfMemory(str(error)) from error
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            raise OutOfMemory(str(error).splitlines()[0]) from error
    return results_of(job, watch, updates)


def results_of(job, watch, updates):
    record, options = job.record, job.options
    setting = setting_of(options, job.accumulation, 1, job.device.type,
                         job.dtype)
    planned = sum(memory_plan(job.config, setting).values())
    update_s = watch.seconds / updates
    rate = job.tokens_per_iter / update_s
    peak_tflops = record['peak_tflops']
    tflops = {name: rate * record[name] / 1e12
              for name in ('flops_per_token', 'flops_per_token_causal')}
    whole = sum(watch.parts.values())
    return {
        'architecture': record['architecture_name'],
        'parameters': record['parameters'],
        'device': record['device'], 'dtype': record['dtype'],
        'attention': record['attention'], 'compile': options['compile'],
        'activation_checkpointing': job.activation_checkpointing,
        'activation_memory_budget': options['activation_memory_budget'],
        'batch_size': options['batch_size'],
        'block_size': job.config.block_size,
        'accumulation': job.accumulation,
        'updates': updates, 'update_ms': update_s * 1e3,
        'tokens_per_s': rate, 'tflops': tflops['flops_per_token'],
        'peak_tflops': peak_tflops,
        'mfu': peak_tflops and tflops['flops_per_token'] / peak_tflops,
        'mfu_causal': peak_tflops and (
            tflops['flops_per_token_causal'] / peak_tflops),
        'peak_gb': watch.peak and watch.peak / 1e9,
        'reserved_gb': watch.reserved and watch.reserved / 1e9,
        'planned_gb': planned / 1e9,
        'peak_over_plan': watch.peak and watch.peak / planned,
        'split': {part: seconds / whole
                  for part, seconds in watch.parts.items()},
        'split_update_ms': whole * 1e3 / (watch.end - watch.last),
        'versions': record['versions'], 'commit': record['commit']}


def lines_of(r):
    """The results as lines of at most 80 columns."""
    def gb(value):
        return f'{value:.3f} GB' if value < 1 else f'{value:.1f} GB'

    mfu = 'the peak of this device is not known: no MFU'
    if r['mfu']:
        mfu = (f'{r["mfu"]:.1%} of {r["peak_tflops"]:g} TFLOP/s; causal '
               f'attention counted by half: {r["mfu_causal"]:.1%}')
    memory = f'planned {gb(r["planned_gb"])}'
    if r['peak_gb']:
        memory = (f'{gb(r["peak_gb"])}, {memory}: '
                  f'{r["peak_over_plan"]:.2f} of it')
    if r['reserved_gb']:
        memory += f'; {gb(r["reserved_gb"])} reserved'
    rows = [
        ('architecture', r['architecture']),
        ('parameters', f'{r["parameters"]["total"]:,}'),
        ('device', f'{r["device"]}, torch {r["versions"]["torch"]}'),
        ('computing', f'{r["dtype"]}, {r["attention"]}, '
         f'{"compiled" if r["compile"] else "not compiled"}, recomputation '
         f'{r["activation_checkpointing"]}, budget '
         f'{r["activation_memory_budget"]:g}'),
        ('batch', f'{r["batch_size"]} x {r["block_size"]} tokens x '
         f'{r["accumulation"]} micro-steps'),
        ('speed', f'{r["tokens_per_s"]:,.0f} tokens/s, '
         f'{r["update_ms"]:,.1f} ms an update, {r["tflops"]:.3g} TFLOP/s'),
        ('MFU', mfu),
        ('peak memory', memory),
        ('time', ', '.join(f'{part} {share:.1%}'
                           for part, share in r['split'].items()
                           if part != 'other')),
        # they are computed along with the loss
        ('', 'where forward includes the gradients of the head')]
    return [textwrap.fill(value, 80, initial_indent=f'{name:13} ',
                          subsequent_indent=14 * ' ',
                          break_on_hyphens=False) for name, value in rows]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('config', nargs='*', help='config files, and options of train.py as '
        '--name=value')
    add('--warmup', type=int, default=3,
        help='updates before the clock; default: %(default)s')
    add('--updates', type=int, default=10,
        help='updates that are timed; default: %(default)s')
    add('--split', type=int, default=3, help='updates of which the parts are '
        'timed; default: %(default)s')
    add('--json', type=Path, help='write the results to this file as well')
    args, options = parser.parse_known_args()
    results, problem = None, None
    try:
        results = measure(args.config + options, warmup=args.warmup,
                          updates=args.updates, split=args.split)
    except ValueError as error:
        exit_with(error)
    except OutOfMemory as error:
        problem = str(error)
    if args.json:
        args.json.write_text(json.dumps(
            results or {'error': 'out of memory', 'reason': problem},
            indent=1) + '\n')
    if problem:
        exit_with(f'out of memory: {problem}', status=1)
    print('\n'.join(lines_of(results)))


if __name__ == '__main__':
    main()
