"""What a run shows and records while it trains: clock, log lines, bar."""

import time

from tqdm import tqdm

from training.device import peak_memory_gb, synchronize
from training.terminal import duration


class Progress:
    """Times the steps, writes train and eval records, prints their lines.

    The clock runs during training steps only, not during evaluations and
    checkpoints, and is read when the device has done its work.
    """

    def __init__(self, job):
        self.job = job
        self.log_interval = job.options['log_interval']
        self.pauses = [job.options[name] for name in
                       ('eval_interval', 'checkpoint_interval')
                       if job.options[name]]
        self.time_s = max((r['time_s'] for r in job.records
                           if 'time_s' in r), default=0.0)
        self.silent = not job.ranks.is_main
        self.bar = tqdm(total=job.max_iters, initial=job.start_step,
                        unit='step', dynamic_ncols=True,
                        disable=self.silent or None)
        self.wandb = Wandb(job) if (
            job.options['wandb_log'] and not self.silent) else None
        self._begin = None
        self._steps = 0      # since the last line
        self._seconds = 0.0
        self._first = True   # its time holds compilation and warm-up
        self._told_duration = False
        self.profiler = None
        if job.options['profile'] and not self.silent:
            self.profiler = job.at_exit.enter_context(self._profiler())
        job.at_exit.callback(self.close)

    def _profiler(self):
        """A trace of three updates, after two that compile and one that
        warms up: where the time of a step goes."""
        from torch.profiler import profile, schedule

        def write(profiler):
            path = self.job.run.folder / 'profile.json.gz'
            profiler.export_chrome_trace(str(path))
            self.say(f'profile: {path}, to be opened at '
                     'https://ui.perfetto.dev')

        return profile(schedule=schedule(wait=2, warmup=1, active=3, repeat=1),
                       on_trace_ready=write)

    def step_begins(self):
        if not self._first:  # which may compile, here longer than there
            self.job.expect_steps()
        self._begin = time.perf_counter()

    def step_ended(self, step, loss, grad_norm, lr):
        """Count the step; every log_interval, write its record and line."""
        last = step == self.job.max_iters
        logged = step % self.log_interval == 0 or self._first or last
        # where an evaluation or a checkpoint follows, too: it would wait for
        # the device while the clock stands
        if logged or any(step % interval == 0 for interval in self.pauses):
            synchronize(self.job.device)
        seconds = time.perf_counter() - self._begin
        self._seconds += seconds
        self.time_s += seconds
        self._steps += 1
        self.bar.update()
        if self.profiler:
            self.profiler.step()
        if logged:
            self._log(step, loss.item(), grad_norm.item(), lr)
            self._first = False
            self._steps, self._seconds = 0, 0.0

    def _log(self, step, loss, grad_norm, lr):
        job, record = self.job, self.job.record
        step_s = self._seconds / self._steps
        values = {
            'step': step, 'loss': loss, 'grad_norm': grad_norm, 'lr': lr,
            'tokens': step * job.tokens_per_iter,
            'tokens_per_s': None, 'mfu': None, 'mfu_causal': None,
            'tflops': None, 'step_ms': step_s * 1e3,
            'memory_gb': peak_memory_gb(job.device), 'time_s': self.time_s}
        if not self._first:
            rate = job.tokens_per_iter / step_s
            tflops = rate * record['flops_per_token'] / 1e12
            values |= {'tokens_per_s': rate, 'tflops': tflops}
            if record['peak_tflops']:
                peak = record['peak_tflops'] * record['world_size']
                causal = record['flops_per_token_causal']
                values |= {'mfu': tflops / peak,
                           'mfu_causal': rate * causal / 1e12 / peak}
        self.record('train', **values)
        self.say(train_line(values, job.max_iters))
        if (values['tokens_per_s'] and not self._told_duration
                and step < job.max_iters):
            left = (job.max_iters - step) * step_s
            self.say(f'about {duration(left)} of training left at '
                     f'{values["tokens_per_s"]:,.0f} tokens/s')
            self._told_duration = True

    def evaluated(self, step, val_loss, val_bpb):
        self.record('eval', step=step, val_loss=val_loss, val_bpb=val_bpb,
                    tokens=step * self.job.tokens_per_iter,
                    time_s=self.time_s)
        bits = '' if val_bpb is None else f'  {val_bpb:.4f} bits per byte'
        self.say(f'eval {step:>6}  val loss {val_loss:.4f}{bits}')

    def skipped(self, step, reason):
        self.record('skipped', step=step, reason=reason)
        self.say(f'left out, not finite: {reason}')

    def record(self, kind, **values):
        self.job.run.append(kind, **values)
        if self.wandb:
            self.wandb.log(kind, values)

    def say(self, line):
        if not self.silent:
            self.bar.write(line)

    def eval_bar(self, batches):
        n = self.job.eval_set.n_batches(self.job.options['batch_size'],
                                        self.job.ranks.world_size)
        return tqdm(batches, total=n, desc='evaluating', leave=False,
                    disable=self.silent or None,
                    dynamic_ncols=True)

    def close(self):
        self.bar.close()
        if self.wandb:
            self.wandb.close()


def train_line(values: dict, max_iters: int) -> str:
    """One logged step in at most 80 columns."""
    width = len(str(max_iters))
    parts = [f'{values["step"]:>{width}}/{max_iters}',
             f'loss {values["loss"]:.4f}', f'norm {values["grad_norm"]:.2f}',
             f'lr {values["lr"]:.1e}']
    if values['tokens_per_s']:
        parts.append(f'{values["tokens_per_s"]:,.0f} tok/s')
        parts.append(f'MFU {values["mfu"]:.1%}' if values['mfu'] else
                     f'{values["tflops"]:.3g} TFLOP/s')
    parts.append(f'{values["memory_gb"]:.1f} GB')
    return '  '.join(parts)


class Wandb:
    """Metrics to Weights & Biases; its failures never stop training."""

    def __init__(self, job):
        self.run = None
        self._call(self._start, job)

    def _start(self, job):
        import wandb
        self.run = wandb.init(
            project=job.options['wandb_project'], dir=job.run.folder,
            name=job.options['wandb_run_name'] or job.run.folder.name,
            id=job.run.folder.name, resume='allow', config=job.record)

    def _call(self, function, *arguments, **named):
        try:
            function(*arguments, **named)
        # whatever a third-party service raises, the training goes on
        except Exception as error:
            tqdm.write(f'wandb is switched off for this run: '
                       f'{type(error).__name__}: {error}')
            self.run = None

    def log(self, kind, values):
        if self.run:
            self._call(self.run.log, {f'{kind}/{name}': value
                                      for name, value in values.items()
                                      if value is not None and name != 'step'},
                       step=values['step'])

    def close(self):
        if self.run:
            self._call(self.run.finish)
