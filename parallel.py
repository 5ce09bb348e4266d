"""Ranks, the processes of one run, and what they share: sharded modules (FSDP2) with their optimisers, sums, whole weights.

One process is a group of one: nothing here or elsewhere asks how many ranks there are.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

DEVICE = torch.device(
    f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
)


# ---- Ranks
def start() -> None:
    """Join the ranks that torchrun started, or be the only one: either way there is a process group afterwards."""
    if dist.is_initialized():
        return
    alone = {} if "RANK" in os.environ else {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    # hours: ranks wait for the slowest to sample; a rank that dies is noticed by torchrun, which ends the others
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if DEVICE.type == "cuda" else "gloo",
        timeout=timedelta(hours=4),
        **alone,
    )


def is_first() -> bool:
    """Whether this is the rank that writes and prints."""
    return dist.get_rank() == 0


def on_first(work: Callable):
    """Do work on the first rank and give its result, or its error, to all."""
    result, error = None, None
    if is_first():
        try:
            result = work()
        except Exception as caught:
            error = caught
    box = [result, error]
    dist.broadcast_object_list(box, src=0)
    if is_first() and error:
        raise error  # with its own traceback
    if box[1]:
        raise box[1]
    return box[0]


# ---- Sharding: every rank holds a part of each weight, its gradient and its optimiser state (FSDP2)
def compute_dtype(name: Literal["auto", "bfloat16", "float32"]) -> torch.dtype:
    """Return the dtype of forward and backward: auto is bfloat16 on a GPU, float32 elsewhere."""
    return (
        getattr(torch, name)
        if name != "auto"
        else torch.bfloat16
        if DEVICE.type == "cuda"
        else torch.float32
    )


def shard(
    module: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype, cpu_offload: bool = False
) -> None:
    """Shard a module in place: float32 weights, forward and backward in `dtype`, gradients summed over ranks in float32.

    Each of `layers` is gathered by itself while it runs, the rest with the module; nothing stays gathered after a forward
    (a root that does would keep stale weights over an optimiser step). cpu_offload keeps weights and optimiser on the host.
    """
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = CPUOffloadPolicy(pin_memory=DEVICE.type == "cuda") if cpu_offload else OffloadPolicy()
    for part in (*layers, module):
        part.to(torch.float32)
        fully_shard(
            part, mesh=mesh, reshard_after_forward=True, mp_policy=precision, offload_policy=offload
        )
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)


def begin_calls(module: FSDPModule) -> None:
    """Gather a sharded module for any number of calls, which may differ between ranks; end_calls() must follow."""
    module.unshard()
    module.set_reshard_after_forward(False)
    module.set_reshard_after_backward(False)
    module.set_requires_gradient_sync(False)


def end_calls(module: FSDPModule, example: Sequence[Tensor], learnt: bool) -> None:
    """Free what begin_calls() gathered; if any rank has learnt, sum gradients, by a backward of weight 0 on an example."""
    if learnt:
        module.set_requires_gradient_sync(True)
        (module(*example).sum() * 0).backward()
    module.reshard()


def full_weights(
    module: nn.Module, dtype: torch.dtype, prefix: str = ""
) -> Iterator[tuple[str, Tensor]]:
    """Yield name, without the prefix, and whole tensor of the state dict, one at a time; every rank must take them all."""
    for name, tensor in module.state_dict().items():
        part = tensor.to(device=DEVICE, dtype=dtype if tensor.is_floating_point() else tensor.dtype)
        yield name.removeprefix(prefix), part.full_tensor() if isinstance(part, DTensor) else part


def move(things: Sequence, device: torch.device | str) -> None:
    """Move sharded modules and learners to a device; None is nothing."""
    for thing in things:
        if thing is not None:
            thing.to(device)
    torch.cuda.empty_cache()


def compile_flow(flow: nn.Module, when: Literal["auto", "on", "off"]) -> None:
    """Compile the velocity network, before it is sharded; auto: on a GPU (on a CPU it gains nothing)."""
    if when == "on" or (when == "auto" and DEVICE.type == "cuda"):
        flow.model.compile(dynamic=True)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    dist.all_reduce(values)
    return values


class Learner:
    """A sharded module and its AdamW: steps, its place in memory, its part of a checkpoint."""

    def __init__(self, module: nn.Module, betas: tuple[float, float], weight_decay: float):
        self.module, self.parameters = module, [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, betas=betas, weight_decay=weight_decay, fused=True
        )
        for p in (
            self.parameters
        ):  # what AdamW makes at its first step: now a checkpoint always holds all of it
            moments = {
                name: torch.zeros_like(p, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")
            }
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | moments

    def step(self, lr: float, max_norm: float, denominator: float = 1.0) -> float:
        """Divide gradients by the denominator, clip, step and clear; return the norm. If it is not finite, nothing moves."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:  # no episode was accepted: there is nothing to learn
            return 0.0
        torch._foreach_div_(gradients, denominator)
        norm = nn.utils.get_total_norm(gradients)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(norm):
            torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def to(self, device: torch.device | str) -> None:
        """Move weights and optimiser state; gradients are none between steps."""
        self.module.to(device)  # keeps the parameters' identity, by which the optimiser knows them
        for state in self.optimizer.state.values():
            state.update({name: tensor.to(device) for name, tensor in state.items()})

    def state_dict(self) -> dict:
        module, optimizer = get_state_dict(self.module, self.optimizer)
        return {"module": module, "optimizer": optimizer}

    def load_state_dict(self, state: dict) -> None:
        parts = {"model_state_dict": state["module"], "optim_state_dict": state["optimizer"]}
        set_state_dict(self.module, self.optimizer, **parts)
