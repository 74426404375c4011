"""Train a language model: one page of options, one page of training.

Runs on a CPU, a GPU, or under torchrun on many. A config file sets options,
the command line overrides them; every start makes a new run folder in out_dir.

Ctrl-C, SIGTERM and SIGUSR1 save a checkpoint first. Exit status: 0 finished,
1 failed while training or exporting, 2 wrong options or data, 3 a loss or
gradient that is not finite, 128 + n stopped by signal n.

    python train.py config/quickstart.py --arch_preset=llama3
    torchrun --standalone --nproc_per_node=2 train.py config/quickstart.py \
        --gradient_accumulation_steps=2 --use_zero1=True
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
from training.dataset import DatasetError
from training.device import DTYPES, autocast
from training.distributed import (
    LostContact,
    OtherRankFailed,
    contact,
    leave,
    sum_over_ranks,
)
from training.evaluation import evaluate
from training.nonfinite import FiniteGuard, NotFinite
from training.optimizer import learning_rate_at
from training.progress import Progress
from training.startup import start
from training.stop_signals import Stopped, StopSignals

# run
out_dir: str = 'out'  # each start makes out_dir/run_YYYYMMDD_HHMMSS
init_from: str = 'scratch'  # scratch; resume: go on with the newest run of
#   out_dir; auto: resume an unfinished run of these options, else start;
#   or the path of a run or checkpoint whose weights to begin with; or hf:NAME,
#   hf:PATH: a Hugging Face model, which decides the architecture
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
skip_nonfinite_steps: NonNegative = 0  # so many updates of the run may be left
#   out for a loss or gradient that is not finite; the next one stops it

# evaluation, checkpoints and logs
eval_interval: Positive = 250  # updates; also before the first and at the end
eval_bytes: Positive | None = None  # text scored, the first whole documents;
#   None: 1,000,000, on a CPU 20,000
log_interval: Positive = 10
gradient_log_interval: Positive | None = None  # updates between records of
#   the gradient norms by groups of layers; None: none
checkpoint_interval: Positive | None = None  # None: at evaluations only
always_save_checkpoint: bool = False  # True: at every evaluation, not only at
#   one that is the best so far
keep_checkpoints: Positive = 2  # newest ones; the best is kept as well
export_hf_at_end: bool = False  # the last weights into hf/ of the run folder,
#   for transformers, vLLM, llama.cpp (hf_convert.py export)
wandb_log: bool = False
wandb_project: str = 'architectures'
wandb_run_name: str | None = None  # None: the run folder's name

# system
device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps
dtype: Literal[tuple(DTYPES)] = 'bfloat16'  # of the matmuls;
#   weights, their gradients and the optimizer are float32
compile: bool = True  # torch.compile
activation_checkpointing: Literal['none', 'full'] = 'none'  # full: keep no
#   activations within a block, compute them again in the backward pass
activation_memory_budget: Share = 1.0  # of what compile would keep of them;
#   below 1 it computes the cheap ones again; without compile: as full
use_zero1: bool = False  # shard the optimizer's state over the processes
use_fsdp: bool = False  # shard everything over the processes (FSDP2)
fsdp_reshard_after_forward: bool = False  # True: less memory, more traffic
dist_timeout_s: PositiveFloat = 600.0  # a rank that keeps the others waiting
#   for longer ends the job: at the start, in an evaluation, in a save
step_timeout_s: PositiveFloat = 120.0  # the same in an update but the first
deterministic: bool = False  # only algorithms that give the same bits again
peak_tflops: PositiveFloat | None = None  # dense peak, for MFU; None: by name
profile: bool = False  # a trace of updates 4 to 6, in the run folder
dry_run: bool = False  # print what the run would need, and end


def main():
    stop = StopSignals()
    try:
        job = start(globals(), __file__, sys.argv[1:], stop)
    except (OtherRankFailed, LostContact, Stopped, OSError,
            ValueError) as error:
        leave(error)
        exit_before_training(error)
    try:
        with job, contact():
            status = train(job, stop)
    except NotFinite as error:
        if job.ranks.is_main:  # all ranks have the same
            exit_with(error, status=3)
        sys.exit(3)
    except OtherRankFailed:
        sys.exit(1)
    # a full disk, a damaged bin, a dead rank
    except (OSError, DatasetError, LostContact) as error:
        exit_with(f'{error}\nOnce this is mended, --init_from=resume '
                  f'--out_dir={job.run.folder} goes on from the last '
                  'checkpoint.', status=1)
    sys.exit(status)


def exit_before_training(error):
    if isinstance(error, OtherRankFailed):
        sys.exit(2)
    if isinstance(error, Stopped):
        print(error, file=sys.stderr)
        sys.exit(128 + error.number)
    exit_with(error, status=1 if isinstance(error, LostContact) else 2)


def train(job, stop) -> int:
    """The training loop; returns the exit status."""
    strategy = job.strategy
    forward = prepare_model(job)
    training_forward = strategy.wrap(forward)
    progress = Progress(job)
    guard = FiniteGuard(job, progress)
    step = job.start_step
    if evaluation_due(job, step) and not job.evaluated_at(step):
        evaluate_and_save(job, forward, step, stop, progress)

    while step < job.max_iters and not stop.agreed():
        lr = learning_rate_at(step, **job.schedule)
        strategy.set_learning_rate(lr)
        # dropout is a function of step and rank: resuming needs no state
        torch.manual_seed(((seed * 2**32 + step) * 2**16 + job.ranks.rank)
                          % 2**64)

        progress.step_begins()
        loss = torch.zeros((), device=job.device)  # of this rank
        for micro_step in range(job.accumulation):
            x, y = job.loader.next_batch()
            last = micro_step == job.accumulation - 1
            with (strategy.accumulating(last),
                  autocast(job.device, job.dtype)):
                _, micro_loss = training_forward(x, y, return_logits=False)
                # all micro-steps of all ranks have equally many tokens: the
                # mean of their means is the mean over the tokens
                micro_loss = micro_loss / job.accumulation
                micro_loss.backward()
            loss += micro_loss.detach()
        if gradient_log_interval and (step + 1) % gradient_log_interval == 0:
            progress.record('gradients', step=step + 1,
                            **strategy.gradient_norms())
        grad_norm = strategy.clip(grad_clip or math.inf)
        mean_loss = sum_over_ranks(loss) / job.ranks.world_size
        strategy.step(skip=guard.skip(step, loss, mean_loss, grad_norm))
        strategy.drop_gradients()
        step += 1
        progress.step_ended(step, mean_loss, grad_norm, lr)

        if evaluation_due(job, step):
            guard.check()
            evaluate_and_save(job, forward, step, stop, progress)
        elif checkpoint_interval and step % checkpoint_interval == 0:
            guard.check()
            job.save(step)

    guard.check()
    if not job.evaluated_at(job.max_iters):  # a signal ended it before
        return stop_early(job, step, stop.agreed(), progress)
    exported = not export_hf_at_end or job.export_hf(progress.say)
    progress.record('end', step=step, status='finished', reason=None)
    progress.say(f'done: {job.run.folder}')
    return 0 if exported else 1


def prepare_model(job):
    """What to call for a forward pass.

    From the inside out: activation checkpointing of each block, so that the
    compiler sees what is computed again; torch.compile of each block's
    forward and of the loss; around them FSDP2's hooks, which build_strategy
    has set, or DDP (strategy.wrap).
    """
    if job.activation_checkpointing == 'full':
        job.model.checkpoint_blocks()
    if compile:
        job.model.compile_parts(activation_memory_budget)
    return job.model


def evaluation_due(job, step) -> bool:
    return step % eval_interval == 0 or step == job.max_iters


def evaluate_and_save(job, forward, step, stop, progress):
    job.expect_delays()  # its first batch may compile
    result = evaluate(
        forward, job.eval_set, batch_size=batch_size, device=job.device,
        dtype=job.dtype, ranks=job.ranks, progress=progress.eval_bar,
        stopped=stop.agreed)
    if result is None:
        return  # a signal came: the loop ends and saves, resuming evaluates
    val_loss, val_bpb = result
    job.evaluated_steps.add(step)
    progress.evaluated(step, val_loss, val_bpb)
    best = val_loss < job.best_val_loss  # not if it is NaN
    job.best_val_loss = val_loss if best else job.best_val_loss
    if step > 0 and (best or always_save_checkpoint or step == job.max_iters
                     or (checkpoint_interval
                         and step % checkpoint_interval == 0)):
        job.save(step, val_loss)


def stop_early(job, step, signal_number, progress) -> int:
    """Save and say how to go on; 128 + the signal's number, as shells do."""
    job.save(step)
    progress.record('end', step=step, status='stopped',
                    reason=f'signal {signal_number}')
    progress.say(f'stopped at step {step}; to go on: the same command with '
                 f'--init_from=resume --out_dir={job.run.folder}')
    return 128 + signal_number


if __name__ == '__main__':
    main()
