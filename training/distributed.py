"""The processes of a job: joining them, agreeing, and leaving.

torchrun sets RANK, LOCAL_RANK and WORLD_SIZE in the environment; without them
there is one process.
"""

import contextlib
import gc
import os
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among those of the job."""

    rank: int = 0
    local_rank: int = 0  # among those of this node: its GPU's number
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_of_environment() -> Ranks:
    return Ranks(int(os.environ.get('RANK', 0)),
                 int(os.environ.get('LOCAL_RANK', 0)),
                 int(os.environ.get('WORLD_SIZE', 1)))


def join(ranks: Ranks, timeout_s: float):
    """Meet the other processes; a collective that waits longer than
    `timeout_s` for a rank ends the job instead of hanging it."""
    if ranks.world_size == 1:
        return
    # DDP imports it, and its functions then keep the group as a default
    # argument for ever: gloo's threads would meet the interpreter's end
    import torch.distributed.nn.functional  # noqa: F401
    timeout = timedelta(seconds=timeout_s)
    store, rank, world_size = next(dist.rendezvous('env://', timeout=timeout))
    store.set_timeout(timeout)
    # torchrun's store outlives a restart of its workers: without a name of
    # their own they would connect to the addresses of the dead. On several
    # nodes the counts may differ; there, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    # gives each start a new store.
    if os.environ.get('GROUP_WORLD_SIZE') == '1':
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')
        store = dist.PrefixStore(f'attempt_{attempt}', store)
    dist.init_process_group(
        'cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo',
        store=store, rank=rank, world_size=world_size, timeout=timeout)


def set_timeout(seconds: float):
    """From now on, a collective that waits longer for a rank raises."""
    if dist.is_initialized():
        # torch has no public name for it
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))


def leave(error: BaseException | None = None):
    """End the process group, and what may hold it: the frames that `error`
    has come through, and cycles of FSDP2's."""
    if not dist.is_initialized():
        return
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    gc.collect()
    dist.destroy_process_group()


def agree_max(value: int) -> int:
    """The largest of all ranks' values, through the CPU: a GPU does not
    wait for it."""
    if not dist.is_initialized():
        return value
    tensor = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor, on the same device, summed over the ranks."""
    if dist.is_initialized():
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def values_of_ranks(value: float) -> list[float]:
    """One number of each rank, in the order of the ranks."""
    if not dist.is_initialized():
        return [value]
    here = torch.tensor([value], dtype=torch.float64)
    gathered = [torch.empty_like(here) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, here)
    return [float(t) for t in gathered]


def broadcast_text(text: str) -> str:
    """Rank 0's text on every rank."""
    if not dist.is_initialized():
        return text
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    length = torch.tensor(len(data))
    dist.broadcast(length, 0)
    if dist.get_rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()


class LostContact(RuntimeError):
    """Another rank has ended or is silent; its own output may say why."""


@contextlib.contextmanager
def contact():
    """Raise LostContact for what the libraries below raise of a lost rank."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and 'gloo' not in str(error):
            raise
        said = str(error).splitlines()[0].partition(' This is typically')[0]
        raise LostContact(
            'lost contact with another rank, which has ended or was silent '
            'for longer than step_timeout_s or dist_timeout_s allows; its own '
            f'output may say why ({said})') from error


class OtherRankFailed(RuntimeError):
    """Another rank raised; its own message stands in its output."""


def all_or_none(function, *arguments, **named):
    """Call on every rank; if it raises on one, raise on all.

    So that none waits in a collective for a rank that has gone. An error of
    rank 0 is raised by rank 0 alone, since mostly all ranks have the same;
    otherwise each rank raises its own, and the rest OtherRankFailed.
    """
    result = error = None
    try:
        result = function(*arguments, **named)
    # whatever it is, it is raised again below, once all ranks know of it
    except Exception as raised:
        error = raised
    here = dist.get_rank() if dist.is_initialized() else 0
    worst = agree_max(0 if error is None else 2 if here == 0 else 1)
    if error is not None and (here == 0 or worst == 1):
        raise error
    if worst:
        raise OtherRankFailed('another rank failed and says why')
    return result


def on_main(ranks: Ranks, function, *arguments):
    """Call on rank 0, while the others wait; if it raises, all raise.

    Returns the function's result on rank 0, None elsewhere.
    """
    return all_or_none(function if ranks.is_main else lambda *_: None,
                       *arguments)
