"""The ranks (processes) of one run and what they share: sharded modules, sums, whole weights.

A single process is a group of one rank; shard() leaves its modules whole where that changes nothing.

What lives where, with FSDP2:

    weights, gradients, AdamW's moments  sharded, in float32: each rank holds a part of every tensor
    weights that are frozen              sharded, in the dtype given to shard()
      with shard(cpu_offload=True)       the parts are in host memory
      between offload() and restore()    likewise, see HostCopy
    weights of the layer that runs       gathered on every rank, in the dtype given to shard()
    all weights after begin_calls()      gathered likewise, until end_calls()
    full_weights()                       one whole tensor at a time, on the device of every rank
    gather_weights()                     all whole tensors, in host memory of the first rank
    Learner.state_dict()                 sharded, without what is frozen: each rank writes its part
                                         of a checkpoint
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from infra import ranks
from infra.cores import cores_of_rank
from infra.processes import end_with_parent


def find_device() -> torch.device:
    """Return the device of this rank: its own GPU, or the CPU where there are none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def check_device() -> None:
    """Raise ValueError if there is a GPU for this rank that torch cannot use."""
    asks_for_cpu = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    has_driver = Path("/dev/nvidiactl").exists()
    if torch.version.cuda and has_driver and not asks_for_cpu and not torch.cuda.is_available():
        version = Path("/sys/module/nvidia/version")
        version = version.read_text().strip() if version.exists() else "of unknown version"
        raise ValueError(
            f"this torch, built for CUDA {torch.version.cuda}, cannot use the NVIDIA driver "
            f"{version} of this machine: install a newer driver (CUDA 13 needs 580) or a torch for "
            "an older CUDA, or set CUDA_VISIBLE_DEVICES= to run on the CPU"
        )
    n_visible = torch.cuda.device_count()
    if DEVICE.type == "cuda" and DEVICE.index >= n_visible:
        raise ValueError(
            f"LOCAL_RANK is {DEVICE.index}, but this process sees {n_visible} GPUs: let all ranks "
            "of a node see all of its GPUs, e.g. by one torchrun a node"
        )


DEVICE = find_device()


# ---- Ranks
PATIENCE = timedelta(hours=4)  # as when the others sample, or the first rank writes
# On GPUs, a group of all ranks that waits for hours. The default group there is NCCL's, whose ranks
# hang if it waits long. None: the default group waits for hours itself
patient_group: dist.ProcessGroup | None = None


def start() -> None:
    """Start the process group: join the ranks that torchrun started, or become the only one.

    ValueError if torch cannot use the GPU that this rank should have.
    """
    global patient_group
    if dist.is_initialized():
        return
    check_device()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun is the parent
        end_with_parent()
    group = {}  # torchrun describes it in the environment
    if "RANK" not in os.environ:
        group = {"rank": 0, "world_size": 1, "store": dist.HashStore()}
    if DEVICE.type == "cpu":
        dist.init_process_group("gloo", timeout=PATIENCE, **group)
        ranks.start_watch(find_groups)
        return
    torch.cuda.set_device(DEVICE)
    dist.init_process_group("cpu:gloo,cuda:nccl", timeout=timedelta(minutes=30), **group)
    patient_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    ranks.start_watch(find_groups)
    # torchrun leaves one thread to a rank: too few for an optimiser in host memory
    torch.set_num_threads(cores_of_rank())


def find_groups() -> list[dist.ProcessGroup | None]:
    """Return the groups of all ranks."""
    return [dist.group.WORLD, patient_group]


class OfOneRankError(ValueError):
    """Input that is invalid in what one rank has: that rank prints it, whichever it is."""


def fork_rng():
    """Return a context after which torch's global generators are as before: CPU and own GPU."""
    return torch.random.fork_rng([DEVICE] if DEVICE.type == "cuda" else [])


def is_first() -> bool:
    """Return whether this is the rank that writes and prints."""
    return dist.get_rank() == 0


def on_first(work: Callable):
    """Call `work` on the first rank and return its result, or raise its error, on all ranks."""
    result = None
    error = None
    if is_first():
        try:
            result = work()
        except Exception as caught:
            error = caught
    box = [result, error]
    dist.broadcast_object_list(
        box, src=0, group=patient_group
    )  # the first rank's own objects stay in its box
    result, error = box
    if error is not None:
        raise error
    return result


def gather_objects(value) -> list:
    """Return every rank's value, in the order of the ranks, on all of them."""
    if dist.get_world_size() == 1:
        # Gloo copies a large value with OpenMP threads of its own. Once there are more threads in
        # all than cores, OpenMP lets them sleep between operations instead of waiting for the next,
        # and small operations take twice as long on a CPU.
        return [value]
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=patient_group)
    return values


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up a tensor over all ranks, in place, and return it."""
    dist.all_reduce(values)
    return values


def send(tensor: Tensor) -> Tensor:
    """Copy a tensor from host memory to the device; the host does not wait for what runs there."""
    if DEVICE.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(DEVICE, non_blocking=True)


def gather_rows(rows: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """Return every rank's rows (n, ...), on all ranks; counts holds each rank's n."""
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [part[:count] for part, count in zip(gathered, counts, strict=True)]


# ---- A GPU's memory, in bytes; 0 on a CPU
def take_peak_memory() -> int:
    """Wait for the GPU; return the largest size of all tensors together since the last call."""
    if DEVICE.type == "cpu":
        return 0
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def memory_of_device() -> tuple[int, int]:
    """Return how much of the GPU's memory is free, whoever uses the rest, and its size."""
    return (0, 0) if DEVICE.type == "cpu" else torch.cuda.mem_get_info()


# ---- Sharding
def compute_dtype(name: Literal["auto", "bfloat16", "float32"]) -> torch.dtype:
    """Return the dtype of forward and backward; `auto`: bfloat16 on a GPU, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if DEVICE.type == "cuda":
        return torch.bfloat16
    return torch.float32


def compiled(function: Callable, when: Literal["auto", "on", "off"]) -> Callable:
    """Return a function compiled, or as it is; `auto` compiles only on a GPU."""
    if when == "off" or (when == "auto" and DEVICE.type != "cuda"):
        return function
    return torch.compile(function, dynamic=True)


def compile_forward(modules: Iterable[nn.Module], when: Literal["auto", "on", "off"]) -> None:
    """Compile the forward of each module in place; modules of one class share what is compiled."""
    for module in modules:
        module.forward = compiled(module.forward, when)


def shard(
    module: nn.Module,
    layers: Sequence[nn.Module],
    dtype: torch.dtype,
    cpu_offload: bool = False,
    methods: Sequence[str] = (),
) -> None:
    """Shard a module in place over all ranks (FSDP2).

    Weights that learn are kept in float32, see set_dtypes, and gradients are summed over ranks in
    float32. Each layer is gathered by itself while it runs, and the rest of the module with the
    root. Nothing stays gathered after a forward: a root that did would keep stale weights over an
    optimiser step.

    A single rank that computes in float32 has nothing to share out and nothing to convert: its
    module stays as it is, which saves 4 to 11 % of a small model's time.

    Args:
        module: the root.
        layers: parts of the module that are gathered by themselves.
        dtype: dtype of forward and backward.
        cpu_offload: keep weights, gradients and optimiser state in host memory.
        methods: names of the module's methods that gather it as its forward does.
    """
    if dist.get_world_size() == 1 and dtype == torch.float32 and not cpu_offload:
        module.to(DEVICE)
        set_dtypes(module, dtype)
        for parameter in module.parameters():
            parameter.data = parameter.data.clone()  # its memory may be a file's: see HostCopy
        return
    mesh = init_device_mesh(DEVICE.type, (dist.get_world_size(),))
    # forward inputs are not cast: advantages and old log-probs stay in float32
    precision = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    offload = OffloadPolicy()
    if cpu_offload:
        offload = CPUOffloadPolicy(pin_memory=DEVICE.type == "cuda")
    for part in (*layers, module):
        set_dtypes(part, dtype)
        fully_shard(
            part, mesh=mesh, reshard_after_forward=True, mp_policy=precision, offload_policy=offload
        )
        if dist.get_world_size() > 1:  # one rank's sum is its mean, and a factor costs a copy
            # a sum, not FSDP's mean: the learner divides by the step's own denominator
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
    for method in methods:
        register_fsdp_forward_method(module, method)


def set_dtypes(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's weights in place to what they are kept in: float32 for those that learn.

    Frozen ones need no more than the dtype that they compute in. A layer with adapters has both.
    FSDP2 takes them as one group: what it wants of one dtype are the weights that learn (torch 2.11
    to 2.13), whose gradients it sums together, and it gathers all of them in the compute dtype.
    """
    for parameter in module.parameters():
        kept_in = torch.float32 if parameter.requires_grad else dtype
        if parameter.dtype != kept_in:
            parameter.data = parameter.data.to(kept_in)
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.float()


def begin_calls(module: nn.Module) -> None:
    """Gather a sharded module for any number of calls, until end_calls().

    In between the ranks may call it a different number of times.
    """
    if not isinstance(module, FSDPModule):
        return
    module.unshard()
    module.set_reshard_after_forward(False)
    module.set_reshard_after_backward(False)
    module.set_requires_gradient_sync(False)


def end_calls(module: nn.Module, learnt: bool) -> None:
    """Free what begin_calls() gathered and, if any rank has learnt, sum the gradients over ranks.

    FSDP sums gradients only during a backward, so the module does one of weight zero.

    Args:
        module: the module given to begin_calls().
        learnt: whether any rank did a backward since begin_calls(); the same on all ranks.
    """
    if not isinstance(module, FSDPModule):
        return
    if learnt:
        module.set_requires_gradient_sync(True)
        own = module.__dict__.get("forward")  # None: the class's
        module.forward = partial(sum_of_nothing, module)  # around it FSDP does its work
        try:
            module().backward()
        finally:
            del module.forward
            if own:
                module.forward = own
    module.reshard()


def sum_of_nothing(module: nn.Module) -> Tensor:
    """Return 0 by a sum over all weights that learn, whose gradients it makes 0."""
    total = torch.zeros((), device=DEVICE)
    for parameter in module.parameters():
        if parameter.requires_grad:
            total = total + 0 * parameter.sum()
    return total


# ---- Offloading
class HostCopy:
    """Host memory for tensors that have to leave the GPU for a while, again and again.

    The memory is taken once and pinned, so that copies run at the full speed of the bus. Tensors
    keep their identity: offload() empties the memory below them, and restore() fills it again. In
    between nobody may use them.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        """Take memory for tensors, sharded or not; those that share memory count once."""
        storages = {}
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.untyped_storage()
            storages[storage.data_ptr()] = storage
        self.storages = list(storages.values())
        self.sizes = [storage.nbytes() for storage in self.storages]
        self.copies = pinned_memory(sum(self.sizes)).split(self.sizes)

    def offload(self) -> None:
        """Copy the tensors to host memory and free theirs."""
        for storage, copy in zip(self.storages, self.copies, strict=True):
            copy.copy_(bytes_of(storage), non_blocking=True)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()  # all is copied
        for storage in self.storages:
            storage.resize_(0)
        torch.cuda.empty_cache()

    def restore(self) -> None:
        """Give the tensors memory again, and what they held."""
        for storage, size, copy in zip(self.storages, self.sizes, self.copies, strict=True):
            storage.resize_(size)
            bytes_of(storage).copy_(copy, non_blocking=True)


def bytes_of(storage: torch.UntypedStorage) -> Tensor:
    """Return a tensor of bytes that shares the memory of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def pinned_memory(size: int) -> Tensor:
    """Return a tensor of bytes in host memory, pinned if there is a GPU.

    torch's own pinned memory takes the next power of two.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if DEVICE.type == "cuda":
        cuda = torch.cuda.cudart()
        torch.cuda.check_error(cuda.cudaHostRegister(memory.data_ptr(), size, 0))
    return memory


# ---- Whole weights
def full_weights(module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the whole tensor of each entry of the state dict, one at a time.

    All ranks must take all of them together. Floating-point tensors are converted to the dtype
    before they are gathered.
    """
    for name, tensor in module.state_dict().items():
        target = dtype if tensor.is_floating_point() else tensor.dtype
        yield name, gather(tensor.to(device=DEVICE, dtype=target))


def gather_weights(weights: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Return full_weights() in host memory on the first rank, and an empty dict on the others."""
    gathered = {}
    for name, tensor in weights:
        if is_first():
            gathered[name] = tensor.cpu()
    return gathered


def not_finite(module: nn.Module) -> list[str]:
    """Return the names of weights, sharded or not, that are not finite; all ranks together."""
    broken = []
    for name, tensor in module.state_dict().items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not local.isfinite().all():
            broken.append(name)
    return sorted({name for names in gather_objects(broken) for name in names})


def gather(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded; all ranks call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# ---- Learning
class Learner:
    """A sharded module with its AdamW: it makes steps and is checkpointed."""

    def __init__(self, module: nn.Module, betas: tuple[float, float], weight_decay: float):
        self.module = module
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        # biases and the weights of norms do not decay; officially a flow's norms do, as Hugging
        # Face's trainer does not know them as norms
        matrices = [p for p in self.parameters if p.ndim > 1]
        vectors = [p for p in self.parameters if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}]
        if vectors:
            groups.append({"params": vectors, "weight_decay": 0.0})
        self.optimizer = torch.optim.AdamW(groups, betas=betas, fused=True)
        # AdamW makes its state at its first step. It is made now, so that every checkpoint has it.
        for parameter in self.parameters:
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }

    def step(self, lr: float, max_norm: float, denominator: float = 1.0) -> float:
        """Divide the gradients, clip them, make a step of AdamW and clear them.

        Args:
            lr: learning rate of this step.
            max_norm: largest norm of the gradient, after the division.
            denominator: what the gradients, sums over ranks and micro-batches, are divided by.

        Returns:
            The norm before clipping. If it is not finite, no weight has changed. It is 0 if there
            were no gradients.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:  # no episode was accepted: there is nothing to learn
            return 0.0
        torch._foreach_div_(gradients, denominator)
        norm = gather(nn.utils.get_total_norm(gradients)).item()
        if math.isfinite(norm):
            torch._foreach_mul_(gradients, min(1.0, max_norm / (norm + 1e-6)))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> Iterator[Tensor]:
        """Yield all parameters and what is kept of them; between steps that is all."""
        yield from self.module.parameters()
        for state in self.optimizer.state.values():
            yield from state.values()

    def state_dict(self) -> dict:
        """Return what learns and its optimiser state, sharded; any number of ranks can load them.

        Frozen weights are not in it: they are still those of the model on the disk.
        """
        module, optimizer = get_state_dict(self.module, self.optimizer)
        return {"module": without_frozen(module, self.module), "optimizer": optimizer}

    def load_state_dict(self, state: dict) -> None:
        """Take over what state_dict() returned, except AdamW's settings, which stay as they are."""
        groups = self.optimizer.param_groups
        own = [{name: group[name] for name in group if name != "params"} for group in groups]
        set_state_dict(
            self.module,
            self.optimizer,
            model_state_dict=state["module"],
            optim_state_dict=state["optimizer"],
            options=StateDictOptions(strict=False),  # frozen weights stay as they are
        )
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)


def without_frozen(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict without the parameters that do not learn."""
    learns = dict(module.named_parameters(remove_duplicate=False))
    kept = {}
    for name, tensor in state.items():
        if name not in learns or learns[name].requires_grad:
            kept[name] = tensor
    return kept


class Kept:
    """A module that does not learn, or not by gradients: it is checkpointed all the same."""

    def __init__(self, module: nn.Module):
        self.module = module

    def state_dict(self) -> dict:
        """Return the module's tensors, as Learner.state_dict() does."""
        return {"module": self.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what state_dict() returned."""
        self.module.load_state_dict(state["module"])
