"""What vLLM has no option for: each function is called before an engine starts."""

from vllm import __version__, _custom_ops
from vllm.device_allocator import cumem
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

UNREAD = "unread"  # a load format, see UnreadWeights


def keep_weights_unpacked() -> None:
    """Switch off vLLM's oneDNN kernels: they pack weights at the start and never see new ones."""
    has_switch = hasattr(_custom_ops, "_supports_onednn")
    assert has_switch, f"vLLM {__version__}: no switch for packed weights"
    _custom_ops._supports_onednn = False


@register_model_loader(UNREAD)
class UnreadWeights(BaseModelLoader):
    """Leave a model's files unread: the trainer gives all weights before the engine samples.

    Until then parameters have small random values. Buffers keep what the model's construction gave
    them, as they do when a file does not have them. (vLLM's own "dummy" format makes buffers of the
    state dict random, too. A buffer that the trainer does not give would stay random.)
    """

    def download_model(self, model_config) -> None:
        pass

    def load_weights(self, model, model_config) -> None:
        for parameter in model.parameters():
            initialize_single_dummy_weight(parameter)


def zero_woken_memory() -> None:
    """Let vLLM zero the GPU memory that it takes again when it wakes, as it does with ROCm.

    After a deep sleep vLLM restores buffers, and the trainer gives all parameters. Other tensors of
    the model and of its runner, such as the image vectors that Qwen3-VL adds to its first layers,
    would hold whatever is in the new memory. Where they are read before they are written, they were
    0 at the start.
    """
    take_memory = cumem.create_and_map

    def take_zeroed_memory(handle) -> None:
        take_memory(handle)
        _, size, pointer, *_ = handle
        cumem.libcudart.cudaMemset(pointer, 0, size)
        cumem.libcudart.cudaDeviceSynchronize()  # before what was kept is copied back

    cumem.create_and_map = take_zeroed_memory
