"""Train a language model: one page of options, one page of training.

Runs on one CPU or one GPU. A config file sets options, the command line
overrides them; every start makes a new run folder in out_dir. Ctrl-C and
SIGTERM save a checkpoint first. Exit status: 0 finished, 2 wrong options or
data, 3 a loss or gradient that is not finite, 128 + n stopped by signal n.

    python train.py config/quickstart.py --arch_preset=llama3
"""

import math
import sys
from typing import Literal

import torch

from model_config import CHOICES, PRESET_CONFIGS
from training.configurator import (
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Share,
    exit_with,
)
from training.device import DTYPES, autocast
from training.evaluation import evaluate
from training.optimizer import learning_rate_at
from training.progress import Progress, StopSignals
from training.startup import start

# run
out_dir: str = 'out'  # each start makes out_dir/run_YYYYMMDD_HHMMSS
init_from: str = 'scratch'  # scratch; resume: go on with the newest run of
#   out_dir; auto: resume an unfinished run of these options, else start;
#   or the path of a run or checkpoint whose weights to begin with
seed: NonNegative = 1337  # of the weights, the order of the data, dropout

# data
dataset: str = 'python_stdlib'  # data/<dataset>, or the path of a folder
batch_size: Positive = 12  # sequences per micro-step and process
gradient_accumulation_steps: Positive = 1  # micro-steps per update, counted
#   over all processes

# architecture; None: the preset decides
arch_preset: Literal[tuple(PRESET_CONFIGS)] = 'gpt2'
n_layer: Positive | None = None
n_head: Positive | None = None
n_embd: Positive | None = None
num_key_value_heads: Positive | None = None  # fewer than n_head: GQA
head_dim: Positive | None = None
d_ff: Positive | None = None  # width of the feed-forward layer
block_size: Positive | None = None  # tokens of a sequence
vocab_size: Positive | None = None  # None: the dataset's
normalization: Literal[CHOICES['normalization']] | None = None
activation: Literal[CHOICES['activation']] | None = None
position_encoding: Literal[CHOICES['position_encoding']] | None = None
norm_position: Literal[CHOICES['norm_position']] | None = None
ffn_type: Literal[CHOICES['ffn_type']] | None = None
attention_backend: Literal[CHOICES['attention_backend']] | None = None
qk_norm: bool | None = None  # normalise each head's q and k
bias: bool | None = None  # in linear layers and LayerNorm
weight_tying: bool | None = None  # head and embedding share their weights
dropout: float | None = None
rope_theta: PositiveFloat | None = None
rope_scaling: dict | None = None  # Llama 3.1's
norm_eps: PositiveFloat | None = None

# optimizer
max_iters: Positive = 1000  # updates
max_tokens: Positive | None = None  # stands for max_iters if set
learning_rate: PositiveFloat = 6e-4
lr_schedule: Literal['cosine', 'wsd'] = 'cosine'
warmup_iters: NonNegative | None = None  # None: 2 % of max_iters
lr_decay_iters: Positive | None = None  # None: max_iters
wsd_decay_iters: Positive | None = None  # None: 20 % of lr_decay_iters
min_lr: NonNegativeFloat | None = None  # None: learning_rate / 10
weight_decay: NonNegativeFloat = 0.1  # on matrices only
beta1: Share = 0.9
beta2: Share = 0.95
adam_eps: PositiveFloat = 1e-8
grad_clip: NonNegativeFloat = 1.0  # 0: gradients are not clipped

# evaluation, checkpoints and logs
eval_interval: Positive = 250  # updates; also before the first and at the end
eval_bytes: Positive | None = None  # text scored, the first whole documents;
#   None: 1,000,000, on a CPU 20,000
log_interval: Positive = 10
checkpoint_interval: Positive | None = None  # None: at evaluations only
always_save_checkpoint: bool = False  # True: at every evaluation, not only at
#   one that is the best so far
keep_checkpoints: Positive = 2  # newest ones; the best is kept as well
wandb_log: bool = False
wandb_project: str = 'architectures'
wandb_run_name: str | None = None  # None: the run folder's name

# system
device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype: Literal[tuple(DTYPES)] = 'bfloat16'  # of the matmuls;
#   weights, their gradients and the optimizer are float32
compile: bool = True  # torch.compile
use_zero1: bool = False  # shard the optimizer's state over the processes
use_fsdp: bool = False  # shard everything over the processes (FSDP2)
peak_tflops: PositiveFloat | None = None  # dense peak, for MFU; None: by name


def main():
    try:
        job = start(globals(), __file__, sys.argv[1:])
    except ValueError as error:
        exit_with(error)
    with job:
        status = train(job)
    sys.exit(status)


def train(job) -> int:
    """The training loop; returns the exit status."""
    model, optimizer, run = job.model, job.optimizer, job.run
    forward = torch.compile(model, dynamic=False) if compile else model
    progress = Progress(job)
    stop = StopSignals()
    step = job.start_step
    if step == 0:
        evaluate_and_save(job, forward, step, progress)

    while step < job.max_iters and not stop.received:
        lr = learning_rate_at(step, **job.schedule)
        for group in optimizer.param_groups:
            group['lr'] = lr
        # dropout is a function of the step, so that resuming needs no state
        torch.manual_seed(seed + step)

        progress.step_begins()
        loss = torch.zeros((), device=job.device)
        for _ in range(job.accumulation):
            x, y = job.loader.next_batch()
            with autocast(job.device, job.dtype):
                _, micro_loss = forward(x, y, return_logits=False)
            # all micro-steps have equally many tokens: the mean of their
            # means is the mean over the tokens
            micro_loss = micro_loss / job.accumulation
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = torch.nn.utils.clip_grad_norm_(
            model.parameters(), grad_clip or float('inf'))
        if not math.isfinite(loss.item() + grad_norm.item()):
            return stop_on_nonfinite(job, step, loss, grad_norm, progress)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress.step_ended(step, loss, grad_norm, lr)

        if step % eval_interval == 0 or step == job.max_iters:
            evaluate_and_save(job, forward, step, progress)
        elif checkpoint_interval and step % checkpoint_interval == 0:
            job.save(step)

    if stop.received and step < job.max_iters:
        return stop_early(job, step, stop.received, progress)
    progress.record('end', step=step, status='finished', reason=None)
    progress.close()
    print(f'done: {job.run.folder}')
    return 0


def evaluate_and_save(job, forward, step, progress):
    val_loss, val_bpb = evaluate(
        forward, job.eval_set, batch_size=batch_size, device=job.device,
        dtype=job.dtype, progress=progress.eval_bar)
    progress.evaluated(step, val_loss, val_bpb)
    best = val_loss < job.best_val_loss
    job.best_val_loss = min(val_loss, job.best_val_loss)
    if step > 0 and (best or always_save_checkpoint or step == job.max_iters
                     or (checkpoint_interval
                         and step % checkpoint_interval == 0)):
        job.save(step, val_loss)


def stop_early(job, step, signal_number, progress) -> int:
    """Save and say how to go on; 128 + the signal's number, as shells do."""
    job.save(step)
    progress.record('end', step=step, status='stopped',
                    reason=f'signal {signal_number}')
    progress.close()
    print(f'stopped at step {step}; to go on: python train.py '
          f'--init_from=resume --out_dir={job.run.folder}')
    return 128 + signal_number


def stop_on_nonfinite(job, step, loss, grad_norm, progress) -> int:
    """Nothing of this step has reached the weights; status 3."""
    samples = job.loader.sample_numbers(step)
    reason = (f'loss {loss.item()}, gradient norm {grad_norm.item()} in step '
              f'{step + 1}, samples {samples[0]} to {samples[-1]}')
    progress.record('end', step=step, status='failed', reason=reason)
    progress.close()
    print(f'error: {reason}: stopped before the update. The last checkpoint '
          'is good; resume from it with a lower --learning_rate or '
          '--grad_clip, or with --dtype=float32', file=sys.stderr)
    return 3


if __name__ == '__main__':
    main()
