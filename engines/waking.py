"""Who has the GPU's memory: the engine while it samples, the trainer for the rest of a step."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from infra.parallel import HostCopy
from rollout import Engine


@contextmanager
def awake(
    engine: Engine,
    weights: Callable[[], Iterable[tuple[str, Tensor]]],
    host_copy: HostCopy | None = None,
) -> Iterator[None]:
    """Wake the engine with the policy's weights, and let it sleep at the end; all ranks together.

    weights: returns the policy's, by their names in the state dict
    host_copy: of the trainer's tensors, which leave the GPU in between
    """
    engine.load_weights(weights())
    if host_copy:
        host_copy.offload()
    yield
    engine.sleep()
    if host_copy:
        host_copy.restore()
