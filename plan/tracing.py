"""Run a step on tensors without numbers, as one of many ranks, and count what it takes of a GPU.

    start_ranks(8)
    with Trace() as trace:
        models = …                            made in this context, their weights hold no numbers
        cost = trace.measure(lambda: …)       the most memory, operations, bytes between the ranks

What is fake is torch's FakeTensorMode, whose tensors have shapes and no memory, and its "fake" process
group, in which one process stands for the first of n ranks and nothing is sent. The code that runs is
that of the run. Where it asks for numbers, it gets:

    token ids, masks, indices      real ones: shapes follow from them. They are small
    zeros and ones of a phase      real, too, and what is written into them is lost
    a number read out of a fake    1, and true: norms are finite, checks of finite numbers pass

The device is the CPU, as FSDP asks a GPU for its streams. Chunks of logits are a GPU's. Nothing is
compiled: what a compiler fuses takes less memory than is counted.
"""

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import wraps
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from infra import logprobs, parallel

aten = torch.ops.aten
c10d = torch.ops.c10d
CONSTANTS = (aten.zeros.default, aten.ones.default, aten.full.default, aten.scalar_tensor.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward


class Cost(NamedTuple):
    """What some work takes of one rank."""

    peak: int  # bytes of all tensors, at most
    products: float  # operations of matrix products
    attention: float  # operations of causal attention, which skips half of the pairs of tokens
    sent: int  # bytes that are gathered from all ranks, or summed over them


def start_ranks(n_ranks: int) -> None:
    """Make this process the first of n ranks; no other ones are there, and nothing is sent."""
    dist.init_process_group("fake", rank=0, world_size=n_ranks, store=FakeStore())


class Trace(TorchDispatchMode):
    """Runs code on tensors without numbers and counts; see above."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.in_phase = False
        self.counts = True
        self.sizes: dict[int, tuple[weakref.ref, int]] = {}  # of storages, by their addresses
        self.held = 0  # bytes of all storages
        self.count_anew()

    def count_anew(self) -> None:
        """Begin to count anew; what is there stays."""
        self.peak = self.held
        self.products = 0
        self.attention = 0
        self.sent = 0

    def __enter__(self) -> "Trace":
        self.stack = ExitStack()
        self.stack.enter_context(patch.object(parallel, "gather_objects", of_all_ranks))
        chunk = logprobs.CHUNK_LOGITS_OF_GPU
        self.stack.enter_context(patch.object(logprobs, "CHUNK_LOGITS", chunk))
        resize = self.resizing(torch.UntypedStorage.resize_)
        self.stack.enter_context(patch.object(torch.UntypedStorage, "resize_", resize))
        propagate = self.without_counting(ShardingPropagator._propagate_tensor_meta_non_cached)
        name = propagate.__name__
        self.stack.enter_context(patch.object(ShardingPropagator, name, propagate))
        swap = self.swapping(torch.utils.swap_tensors)
        self.stack.enter_context(patch.object(torch.utils, "swap_tensors", swap))
        self.stack.enter_context(self.fake)
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self.stack.close()

    def measure(self, work: Callable) -> tuple[object, Cost]:
        """Do some work; return its result and what it took, with all that was there before."""
        self.count_anew()
        self.in_phase = True
        try:
            result = work()
        finally:
            self.in_phase = False
        return result, Cost(self.peak, self.products, self.attention, self.sent)

    # ---- What an operation gives
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes again with the part of this rank
        result = self.compute(func, args, kwargs)
        if not self.counts:
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.note_storage(leaf.untyped_storage())
        self.note_work(func, args, kwargs, result)
        return result

    def compute(self, func, args: tuple, kwargs: dict):
        """Compute an operation in numbers if it has them, and else in shapes."""
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            if not tensors and not (self.in_phase and func in CONSTANTS):
                made = func(*args, **kwargs)
                if isinstance(made, Tensor) and made.is_floating_point():
                    return made
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            return 1
        if func in INDEXING:
            args = (args[0], places(args[1]), *args[2:])
        is_written = func._schema.is_mutable and isinstance(args[0], Tensor)
        if is_written and not isinstance(args[0], FakeTensor):
            return args[0]
        return func(*args, **kwargs)

    # ---- Counting
    def note_storage(self, storage: torch.UntypedStorage) -> None:
        """Count a storage that is new, or whose size has changed."""
        address = storage._cdata
        reference, size = self.sizes.get(address, (None, 0))
        if reference is None or reference() is not storage:
            reference = weakref.ref(storage, lambda _: self.forget(address))
            size = 0
        self.sizes[address] = (reference, storage.nbytes())
        self.held += storage.nbytes() - size
        self.peak = max(self.peak, self.held)

    def forget(self, address: int) -> None:
        """Take off a storage that is gone."""
        _, size = self.sizes.pop(address)
        self.held -= size

    def without_counting(self, propagate: Callable) -> Callable:
        """Return the method by which DTensor finds shapes out, on whole tensors that nobody makes."""

        @wraps(propagate)
        def propagate_uncounted(*args, **kwargs):
            self.counts = False
            try:
                return propagate(*args, **kwargs)
            finally:
                self.counts = True

        return propagate_uncounted

    def swapping(self, swap: Callable) -> Callable:
        """Return the function by which a module changes its dtype, for tensors that the mode remembers.

        It refuses those with a weak reference, which the mode keeps of some.
        """

        def forget_and_swap(one: Tensor, other: Tensor) -> None:
            self.fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
            swap(one, other)

        return forget_and_swap

    def resizing(self, resize: Callable) -> Callable:
        """Return the method by which FSDP frees a storage and takes it again, so that it is seen."""

        def resize_and_note(storage: torch.UntypedStorage, size: int):
            result = resize(storage, size)
            if storage._cdata in self.sizes:
                self.note_storage(storage)
            return result

        return resize_and_note

    def note_work(self, func, args: tuple, kwargs: dict, result) -> None:
        """Count the operations of a product, or the bytes of a collective."""
        packet = func._overloadpacket
        if packet is ATTENTION:
            query, key, value = (tensor.shape for tensor in args[:3])
            self.attention += sdpa_flop_count(query, key, value) / 2
        elif packet is ATTENTION_BACKWARD:
            gradient, query, key, value = (tensor.shape for tensor in args[:4])
            self.attention += sdpa_backward_flop_count(gradient, query, key, value) / 2
        elif packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=result)
        elif func is c10d._allgather_base_.default:
            self.sent += args[0].untyped_storage().nbytes()
        elif func is c10d._reduce_scatter_base_.default:
            self.sent += args[1].untyped_storage().nbytes()


def of_all_ranks(value) -> list:
    """Return what gather_objects() would where all ranks have the same value."""
    return [value] * dist.get_world_size()


def places(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return indices with the places of what masks choose: how many there are is a shape."""
    found = []
    with unset_fake_temporarily():
        for index in indices:
            if index is None or index.dtype != torch.bool:
                found.append(index)
            else:
                found += index.nonzero().unbind(1)
    return found
