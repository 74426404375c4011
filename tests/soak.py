"""Kill a run of two processes again and again; it must end the same.

At seeded random moments, each after at least two new steps and many within a
save, one of the two processes gets SIGKILL. The job is started again with the
same command and init_from=auto. At the end the weights, the moments and every
logged loss must equal, to the bit, those of a run that nothing disturbed.

    python tests/soak.py --kills 20
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from training.run_log import read_metrics, resolve_run  # noqa: E402

STEPS_PER_KILL = 12
OPTIONS = dict(
    arch_preset='qwen3', n_layer=2, n_embd=64, n_head=4, head_dim=16, d_ff=96,
    block_size=64, batch_size=2, gradient_accumulation_steps=2,
    weight_tying=True, eval_interval=10, eval_bytes=5000, log_interval=1,
    checkpoint_interval=2, device='cpu', dtype='float32', compile=False,
    deterministic=True, dropout=0.1, dist_timeout_s=30, init_from='auto')


def launch(out_dir, options):
    arguments = [f'--{key}={value}' for key, value in options.items()]
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone',
         '--nproc_per_node=2', str(ROOT / 'train.py'), *arguments,
         f'--out_dir={out_dir}'],
        env=os.environ | {'OMP_NUM_THREADS': '1'}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True)


def steps_logged(out_dir) -> int:
    """Lines of training steps in the logs of all runs so far: a run that is
    killed before its first checkpoint is followed by a new one."""
    logs = out_dir.glob('run_*/metrics.jsonl')
    return sum(log.read_text().count('"kind": "train"') for log in logs)


def kill_one(job, out_dir, chance) -> bool:
    """SIGKILL one of the two workers, at a random moment after two to five
    new steps; False if the run came to its end before."""
    first, moments = steps_logged(out_dir) + 1, []
    more = chance.randint(1, 4)
    for count in first, first + more:
        while steps_logged(out_dir) < count:
            if job.poll() is not None:
                return False
            time.sleep(0.01)
        moments.append(time.monotonic())
    step_s = (moments[1] - moments[0]) / more  # with its share of saves
    time.sleep(chance.uniform(0, step_s))
    workers = [p for p in psutil.Process(job.pid).children()
               if 'train.py' in ' '.join(p.cmdline())]
    if len(workers) < 2:
        return False
    os.kill(chance.choice(workers).pid, signal.SIGKILL)
    return True


def finish(job) -> str:
    out, _ = job.communicate(timeout=120)
    leftovers = [p.pid for p in psutil.process_iter(['cmdline'])
                 if job.args[-1] in (p.info['cmdline'] or [])]
    assert not leftovers, f'processes outlive their job: {leftovers}'
    return out


def outcome(out_dir) -> dict:
    """The final checkpoint's bytes and every step's and evaluation's values."""
    run = resolve_run(out_dir)
    records, damaged = read_metrics(run)
    values = {(r['kind'], r['step']): tuple(
        r.get(key) for key in ('loss', 'grad_norm', 'lr', 'val_loss'))
        for r in records if r['kind'] in ('train', 'eval')}
    files = {path.name: path.read_bytes()
             for path in sorted((run / 'checkpoints' / 'latest').iterdir())
             if path.suffix == '.safetensors'}
    return {'values': values, 'files': files, 'damaged_lines': damaged}


def soak(kills: int, seed: int, strategy: dict, folder: Path, say=print):
    """Raises AssertionError unless the disturbed run equals the other."""
    chance = random.Random(seed)
    options = OPTIONS | strategy | {'max_iters': STEPS_PER_KILL * kills}
    options['dataset'] = folder / 'python_stdlib'
    subprocess.run(
        [sys.executable, str(ROOT / 'data' / 'python_stdlib' / 'prepare.py'),
         f'--out={options["dataset"]}'], check=True, capture_output=True)
    undisturbed = launch(folder / 'undisturbed', options)
    out = finish(undisturbed)
    assert undisturbed.returncode == 0, out
    done, in_save = 0, 0
    while True:
        job = launch(folder / 'disturbed', options)
        if done < kills and kill_one(job, folder / 'disturbed', chance):
            done += 1
            finish(job)
            assert job.returncode != 0
            run = resolve_run(folder / 'disturbed')
            parts = list((run / 'checkpoints').glob('.*.part'))
            in_save += bool(parts)
            say(f'kill {done:>2} of {kills}: '
                f'{steps_logged(folder / "disturbed")} steps logged'
                + (', within a save' if parts else ''))
            continue
        out = finish(job)
        assert job.returncode == 0, out
        break
    assert done == kills, f'the run ended after {done} of {kills} kills'
    expected, found = (outcome(folder / name)
                       for name in ('undisturbed', 'disturbed'))
    assert found['values'] == expected['values']
    assert found['files'].keys() == expected['files'].keys()
    for name, content in expected['files'].items():
        assert found['files'][name] == content, f'{name} differs'
    return done, in_save


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--strategy', default='use_zero1',
                        choices=('ddp', 'use_zero1', 'use_fsdp'))
    arguments = parser.parse_args()
    strategy = {} if arguments.strategy == 'ddp' else {
        arguments.strategy: True}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        done, in_save = soak(arguments.kills, arguments.seed, strategy,
                             Path(folder))
    print(f'{done} kills, {in_save} of them within a save, '
          f'{arguments.strategy}: weights, moments and all losses equal to '
          f'the bit ({time.monotonic() - begin:.0f} s)')


if __name__ == '__main__':
    main()
