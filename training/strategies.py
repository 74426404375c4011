"""How a model is spread over processes: replicated, ZeRO-1 or FSDP2.

A strategy owns the optimizer and answers the same five questions: how to
call the model, when gradients are summed over the ranks, how they are clipped,
how a step is made, and which ranges of the weights and of AdamW's state this
rank holds (what a checkpoint is made of).

                 weights      gradients    optimizer state
    Replicated   all          all          all               DDP
    Zero1        all          all          1/W of elements   DDP
    FSDP         1/W of rows  1/W of rows  1/W of rows       fully_shard
"""

import contextlib
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from training.distributed import sum_over_ranks
from training.layer_groups import layer_group
from training.optimizer import adamw, build_optimizer

ALIGNMENT = 64  # elements; a vector load must not straddle two parameters
MOMENTS = ('exp_avg', 'exp_avg_sq')


@dataclass
class Piece:
    """Elements start..start+len(weight) of a flattened parameter."""

    name: str
    shape: tuple          # of the whole parameter
    start: int
    weight: torch.Tensor  # 1-D, shares the parameter's memory
    owner: torch.Tensor   # the optimizer's key of its state


class Replicated:
    """Every rank holds everything; DDP averages the gradients."""

    weights_on_all_ranks = True
    moments_on_all_ranks = True

    def __init__(self, model, ranks, optimizer_options):
        self.model, self.ranks = model, ranks
        self.optimizer = self._build_optimizer(optimizer_options)
        self.ddp = None

    def _build_optimizer(self, options):
        return build_optimizer(self.model, **options)

    def wrap(self, forward):
        """What to call in place of `forward` in training."""
        if self.ranks.world_size == 1:
            return forward
        device = next(self.model.parameters()).device
        with warnings.catch_warnings():
            # newer versions of torch have another name for broadcast_buffers
            warnings.simplefilter('ignore', FutureWarning)
            # gradients live in DDP's buckets: a second copy of them is 4
            # bytes a parameter
            self.ddp = DistributedDataParallel(
                forward, gradient_as_bucket_view=True, broadcast_buffers=False,
                device_ids=[device] if device.type == 'cuda' else None)
        return self.ddp

    def close(self):
        """Let go of the process group, which cannot end before."""
        self.ddp = None

    def accumulating(self, last: bool):
        """Context of a micro-step; gradients are averaged in the last."""
        if self.ddp is None or last:
            return contextlib.nullcontext()
        return self.ddp.no_sync()

    def gradient_norms(self) -> dict[str, float]:
        """The norm of each group of layers, over all ranks, as it stands."""
        squares = {}
        n_layer = len(self.model.h)
        for name, p in self.model.named_parameters():
            if p.grad is not None:
                squares.setdefault(layer_group(name, n_layer), []).append(
                    sum_of_squares(local_part(p.grad)))
        sums = torch.stack([torch.stack(s).sum() for s in squares.values()])
        norms = self.sum_of_shards(sums).sqrt().tolist()
        return dict(zip(squares, norms, strict=True))

    def clip(self, max_norm: float) -> torch.Tensor:
        """Clip to `max_norm`; the norm before, over all ranks, fp32."""
        grads = [p.grad for p in self.model.parameters()
                 if p.grad is not None]
        grads = [local_part(g) for g in grads]
        squares = torch.stack([sum_of_squares(g) for g in grads]).sum()
        norm = self.sum_of_shards(squares).sqrt()
        share = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, share)
        return norm

    def sum_of_shards(self, value: torch.Tensor) -> torch.Tensor:
        """Add up a number that each rank has for the gradients it holds."""
        return value

    def set_learning_rate(self, lr: float):
        for group in self.optimizer.param_groups:
            group['lr'] = lr

    def step(self, skip: torch.Tensor | None = None):
        """Update the weights; where `skip`, a bool on the device, is true,
        weights and state stay as they are. The host need not know of it."""
        # what torch's GradScaler sets, and the fused kernel looks at
        self.optimizer.found_inf = None if skip is None else skip.float()
        self.optimizer.step()

    def drop_gradients(self):
        self.model.zero_grad(set_to_none=True)

    def pieces(self) -> list[Piece]:
        """The ranges whose optimizer state this rank holds, weights with
        them."""
        return [Piece(name, tuple(p.shape), 0, p.detach().view(-1), p)
                for name, p in self.model.named_parameters()]

    def weights(self) -> list[Piece]:
        """The ranges of the weights that this rank holds."""
        return self.pieces()

    def moment(self, piece: Piece, kind: str) -> torch.Tensor:
        """AdamW's state of a piece, made if there is none yet: 1-D fp32."""
        return self._state(piece.owner)[kind].view(-1)

    def _state(self, owner) -> dict:
        """All of AdamW's state of a tensor, zeros if there is none yet."""
        state = self.optimizer.state[owner]
        if not state:
            state['step'] = torch.zeros((), device=owner.device)
            for kind in MOMENTS:
                state[kind] = torch.zeros_like(
                    owner, memory_format=torch.preserve_format)
        return state

    @property
    def optimizer_bytes(self) -> int:
        """AdamW's state on this rank: two fp32 numbers an element held."""
        return sum(2 * 4 * len(piece.weight) for piece in self.pieces())

    @property
    def optimizer_steps(self) -> int:
        for state in self.optimizer.state.values():
            return int(state['step'])
        return 0

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int):
        for group in self.optimizer.param_groups:
            for p in group['params']:
                self._state(p)['step'].fill_(steps)


class Zero1(Replicated):
    """DDP, with AdamW's state shared out by elements (Rajbhandari et al.
    2020, https://arxiv.org/abs/1910.02054, stage 1).

    The parameters are laid one after another in one flat buffer, and rank r
    updates the r-th of `world_size` equal parts of it, wherever they cut a
    parameter; one all-gather then brings the updated buffer to all.
    """

    moments_on_all_ranks = False

    def _build_optimizer(self, options):
        parameters = list(self.model.named_parameters())
        W = self.ranks.world_size
        starts, end = [], 0
        for _, p in parameters:
            starts.append(end)
            end += -(-p.numel() // ALIGNMENT) * ALIGNMENT
        self.part = -(-end // (W * ALIGNMENT)) * ALIGNMENT
        first = parameters[0][1]
        self.flat = torch.zeros(W * self.part, device=first.device,
                                dtype=first.dtype)
        for (_, p), start in zip(parameters, starts, strict=True):
            place = self.flat[start:start + p.numel()].view_as(p)
            place.copy_(p.data)
            p.data = place

        low = self.ranks.rank * self.part
        self._pieces, dims = [], []
        for (name, p), start in zip(parameters, starts, strict=True):
            a = max(low, start) - start
            b = min(low + self.part, start + p.numel()) - start
            if a < b:
                mine = torch.nn.Parameter(p.data.view(-1)[a:b])
                self._pieces.append(
                    Piece(name, tuple(p.shape), a, mine.detach(), mine))
                dims.append(p.dim())  # decay goes by the whole parameter's
        self._by_name = dict(parameters)
        return adamw([piece.owner for piece in self._pieces], dims, **options)

    def step(self, skip=None):
        for piece in self._pieces:
            grad = self._by_name[piece.name].grad.view(-1)
            piece.owner.grad = grad[piece.start:
                                    piece.start + len(piece.weight)]
        super().step(skip)
        self.optimizer.zero_grad(set_to_none=True)  # views of the model's
        low = self.ranks.rank * self.part
        # torch 2.13 has a new name for it and warns of the old one
        all_gather = getattr(dist, 'all_gather_single', None) or (
            dist.all_gather_into_tensor)
        all_gather(self.flat, self.flat[low:low + self.part].clone())

    def pieces(self):
        return self._pieces

    def weights(self):
        return Replicated.pieces(self)


class FSDP(Replicated):
    """FSDP2: weights, gradients and AdamW's state are sharded by rows.

    Each block is gathered when it runs. Computation in bf16 where asked for,
    the sum of gradients over the ranks in fp32.
    """

    weights_on_all_ranks = False
    moments_on_all_ranks = False

    def __init__(self, model, ranks, optimizer_options, *, dtype, device,
                 reshard_after_forward):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if dtype == 'bfloat16' else None,
            reduce_dtype=torch.float32)
        self.mesh = init_device_mesh(device.type, (ranks.world_size,))
        for block in model.h:
            fully_shard(block, mesh=self.mesh, mp_policy=policy,
                        reshard_after_forward=reshard_after_forward)
        # the head is used again at once in the backward pass
        fully_shard(model, mesh=self.mesh, mp_policy=policy,
                    reshard_after_forward=False)
        super().__init__(model, ranks, optimizer_options)

    def _build_optimizer(self, options):
        # plain tensors on the shards' memory: the fused kernel does not take
        # a DTensor and a plain `found_inf` together
        self._owners, dims = {}, []
        for name, p in self.model.named_parameters():
            local = p.to_local().detach()
            if local.numel():  # few rows may leave a rank none
                self._owners[name] = torch.nn.Parameter(local)
                dims.append(p.dim())
        return adamw(list(self._owners.values()), dims, **options)

    def step(self, skip=None):
        parameters = dict(self.model.named_parameters())
        for name, owner in self._owners.items():
            owner.data = parameters[name].to_local().detach()
            owner.grad = parameters[name].grad.to_local()
        super().step(skip)
        self.optimizer.zero_grad(set_to_none=True)  # they are the model's

    def wrap(self, forward):
        return forward

    def close(self):
        # DTensor's caches keep the mesh for ever, and the mesh the group
        getattr(self.mesh, '_pg_registry', {}).clear()

    def accumulating(self, last):
        self.model.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def sum_of_shards(self, value):
        return sum_over_ranks(value)

    def pieces(self):
        from torch.distributed.fsdp import FSDPModule
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # an evaluation leaves the head gathered
        found = []
        for name, p in self.model.named_parameters():
            local = p.to_local().detach()
            rows = p.shape[0]
            # the rows of rank r under torch.chunk, which FSDP2 follows
            step = -(-rows // self.ranks.world_size)
            first = min(rows, step * self.ranks.rank)
            start = first * (p.numel() // rows)
            if local.numel():
                found.append(Piece(name, tuple(p.shape), start,
                                   local.view(-1), self._owners[name]))
        return found


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor; all of it unless it is a DTensor."""
    # not isinstance: the import of DTensor costs a start without FSDP a second
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def sum_of_squares(grad: torch.Tensor) -> torch.Tensor:
    """Of all elements, fp32.

    torch's vector_norm adds up one by one on a CPU and errs by 5e-5 for the
    gradient of an embedding, otherwise for every way of sharding it; its sum
    does not. On a GPU it adds up in a tree, and needs no squares in memory.
    """
    if grad.device.type == 'cpu':
        return grad.square().sum()
    return torch.linalg.vector_norm(grad).square()


def build_strategy(model, ranks, optimizer_options, *, use_zero1, use_fsdp,
                   reshard_after_forward, dtype, device):
    """The strategy that the options ask for; one process needs none."""
    if ranks.world_size > 1 and use_fsdp:
        return FSDP(model, ranks, optimizer_options, dtype=dtype,
                    device=device,
                    reshard_after_forward=reshard_after_forward)
    if ranks.world_size > 1 and use_zero1:
        return Zero1(model, ranks, optimizer_options)
    return Replicated(model, ranks, optimizer_options)
