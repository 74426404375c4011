"""A loss or gradient that is not finite: seen by all ranks, never applied."""

import math

import torch

from training.device import HostCopy
from training.distributed import values_of_ranks


class NotFinite(RuntimeError):
    """The update after `step` updates was left out, and one too many was."""

    def __init__(self, step: int, report: str):
        super().__init__(
            f'not finite: {report}. Stopped before the update; the last '
            'checkpoint is good. Resume with a lower --learning_rate or '
            '--grad_clip, with --dtype=float32, or leave such steps out with '
            '--skip_nonfinite_steps=N')
        self.step = step


class FiniteGuard:
    """Leaves out updates that are not finite, `allowed` in the whole run.

    The device decides at once, and the host hears of it one update later, when
    it need not wait for it: so a GPU always has work. `check` before anything
    is saved.
    """

    def __init__(self, job, progress):
        self.job, self.progress = job, progress
        self.allowed = job.options['skip_nonfinite_steps']
        self.skipped = sum(r['kind'] == 'skipped' for r in job.records)
        self._pending = None

    def skip(self, step, loss, mean_loss, grad_norm) -> torch.Tensor:
        """Whether to leave out the update after `step` updates: a bool on the
        device, the same on all ranks, as are `mean_loss` and `grad_norm`;
        `loss` is this rank's. Checks the update before this one."""
        self.check()
        bad = ~torch.isfinite(mean_loss + grad_norm)
        self._pending = step, HostCopy(bad), loss, grad_norm
        return bad

    def check(self):
        """Report the last update if it was left out; raise NotFinite, on all
        ranks, if it was one too many."""
        if self._pending is None:
            return
        (step, bad, loss, grad_norm), self._pending = self._pending, None
        if not bad.item():
            return
        report = self._describe(step, loss.item(), grad_norm.item())
        self.skipped += 1
        if self.skipped > self.allowed:
            raise NotFinite(step, report)
        self.progress.skipped(step + 1, report)

    def _describe(self, step, loss, grad_norm) -> str:
        """Which step, ranks and samples; the same on all ranks."""
        losses = values_of_ranks(loss)
        ranks = [rank for rank, value in enumerate(losses)
                 if not math.isfinite(value)]
        where = f'on rank {", ".join(map(str, ranks))}' if ranks else (
            'with a finite loss on every rank')
        options = self.job.options
        samples = (options['batch_size']
                   * options['gradient_accumulation_steps'])
        return (f'step {step + 1}, samples {step * samples} to '
                f'{(step + 1) * samples - 1}: loss '
                f'{sum(losses) / len(losses)}, gradient norm {grad_norm}, '
                f'{where}')
