"""vLLM as an engine: in this process, with the memory that training leaves."""

import math
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from engines.common import check_all_given, end_tokens, not_finite
from infra import vision
from infra.models import Model
from infra.parallel import DEVICE, is_first
from rollout import Capacity, EngineSettings, Episode, Request, Sampling

FEW_SEQUENCES = 256  # sampled at a time by default, but on a large GPU


class VllmEngine:
    """vLLM in this process: an engine a rank, or one that neighbouring ranks call together.

    Asleep it holds neither weights nor cache (sleep level 2) and must be given weights before it
    samples. An engine that can sleep starts asleep, as it has not read the model's weights. On a
    CPU sleeping frees nothing.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings,
        capacity: Capacity,
        device: torch.device,
        dtype: torch.dtype,
        can_sleep: bool,
    ):
        # the engine's loop runs in this process, not in one of its own
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        warnings.filterwarnings("ignore", module="vllm")
        import vllm

        from infra import vllm_setup

        if device.type == "cpu":
            vllm_setup.keep_weights_unpacked()
        if settings.max_sequences is None:
            settings = replace(settings, max_sequences=sequences_on(device))
        self.path = model.path
        self.tokenizer = model.tokenizer
        self.n_ranks = settings.tensor_parallel
        self.end_tokens = end_tokens(model, settings.stop_tokens)
        self.SamplingParams = vllm.SamplingParams
        self.state: Literal["awake", "no cache", "asleep"] = "awake"
        options = device_options(device, can_sleep)
        if can_sleep:
            vllm_setup.zero_woken_memory()
            options["load_format"] = vllm_setup.UNREAD
        if "RANK" in os.environ:
            options["distributed_executor_backend"] = "external_launcher"
        if model.processor is not None:
            options.update(image_options(model.processor, *capacity))
        n_threads = torch.get_num_threads()
        memory_before = tensor_memory()
        self.llm = vllm.LLM(
            model.path,
            dtype=str(dtype).removeprefix("torch."),
            trust_remote_code=model.trust_remote_code,
            generation_config="vllm",
            tensor_parallel_size=settings.tensor_parallel,
            max_model_len=capacity.max_length,
            max_num_seqs=settings.max_sequences,
            kv_cache_memory_bytes=cache_bytes(
                model, settings, capacity.max_length, dtype, free_memory(device)
            ),
            gpu_memory_utilization=0.01,  # checked at the start, no more: the size is given
            max_num_batched_tokens=max(8192, capacity.max_length),
            logprobs_mode="processed_logprobs",  # at the temperature, which raw ones are not
            disable_log_stats=True,
            use_tqdm_on_load=False,
            seed=0,
            **options,
        )
        # vLLM leaves one thread to torch: too few for an optimiser in host memory
        torch.set_num_threads(n_threads)
        self.held_memory = tensor_memory() - memory_before
        if can_sleep:
            self.sleep()  # it has no weights yet

    def sleep(self) -> None:
        if self.state == "no cache":  # vLLM may ignore a sleep when it is only partly awake
            self.wake_up("kv_cache")
        if self.state != "asleep":
            self.llm.sleep(level=2)
        self.state = "asleep"

    def wake_up(self, part: Literal["weights", "kv_cache"]) -> None:
        """Let vLLM take the memory of a part again: first that of the weights, then the cache's."""
        torch.cuda.empty_cache()
        self.llm.wake_up(tags=[part])
        engine = self.llm.llm_engine
        sleeps = part in engine.model_executor.sleeping_tags
        if part == "kv_cache":  # the last
            sleeps = engine.is_sleeping()
        if sleeps:  # vLLM only warns of a call that it ignores
            raise RuntimeError(f"vLLM still sleeps after it was told to wake its {part}")

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        if self.state == "asleep":
            # only the weights: the trainer still needs the cache's memory to gather them
            self.wake_up("weights")
            self.state = "no cache"

        def load(model) -> None:
            loaded = model.load_weights(weights)
            check_all_given(dict(model.named_parameters()).keys() - loaded)

        self.llm.apply_model(load)
        # it holds keys and values of the old weights
        if not self.llm.reset_prefix_cache():
            raise RuntimeError(
                "vLLM cannot reset its prefix cache: it would sample with keys and values of the "
                "old weights; requests must have ended before a sync"
            )
        self.llm.llm_engine.reset_encoder_cache()  # it holds their image vectors

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Episode]:
        if self.state == "asleep":
            raise RuntimeError("the engine sleeps without weights; call load_weights first")
        if self.state == "no cache":  # without a cache vLLM would wait for ever
            self.wake_up("kv_cache")
            self.state = "awake"
        prompts = [self.to_vllm_prompt(request) for request in requests]
        parameters = [self.sampling_parameters(sampling, request) for request in requests]
        # the bar shows tokens a second
        bar = partial(tqdm, leave=False, delay=3) if is_first() else False
        outputs = self.llm.generate(prompts, parameters, use_tqdm=bar)
        episodes = []
        for request, output in zip(requests, outputs, strict=True):
            sampled = [self.to_episode(request, child) for child in output.outputs]
            if all(math.isnan(logp) for episode in sampled for logp in episode.logp):
                raise not_finite(self.path)  # vLLM's own slips are of single tokens
            episodes += sampled
        return episodes

    def sampling_parameters(self, sampling: Sampling, request: Request):
        """Return vLLM's parameters of one request."""
        return self.SamplingParams(
            n=sampling.n,
            seed=request.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            max_tokens=sampling.room(request),
            stop_token_ids=self.end_tokens,
            logprobs=0,  # only that of the sampled token
            flat_logprobs=True,  # in lists, not in an object for each token
            detokenize=False,
        )

    def to_vllm_prompt(self, request: Request) -> dict:
        """Return what vLLM calls a prompt: tokens with one placeholder an image, and the images."""
        if not request.images:
            return {"prompt_token_ids": request.prompt_ids}
        pad = self.tokenizer.convert_tokens_to_ids(vision.PAD)
        return {
            "prompt_token_ids": vision.collapse(request.prompt_ids, pad),
            "multi_modal_data": {"image": [image.open() for image in request.images]},
        }

    def to_episode(self, request: Request, output) -> Episode:
        """Return the episode of one of vLLM's outputs."""
        ids = list(output.token_ids)
        assert output.logprobs.token_ids == ids, "vLLM gave log-probs of other tokens"
        logp = output.logprobs.logprobs
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Episode(request.prompt_ids, ids, logp, output.finish_reason, text)


def device_options(device: torch.device, can_sleep: bool) -> dict:
    """Return vLLM's options that differ between a CPU and a GPU.

    Only an engine that can sleep keeps its memory in vLLM's pool, which a process has once.
    """
    if device.type == "cpu":
        # parts of a prompt cannot be seeded there
        return {"enforce_eager": True, "enable_chunked_prefill": False}
    return {"enable_sleep_mode": can_sleep}


def tensor_memory() -> int:
    """Return the size of all tensors together; torch counts those whose memory is unmapped, too."""
    if DEVICE.type == "cpu":
        return 0
    return torch.cuda.memory_allocated()


def free_memory(device: torch.device) -> float:
    """Return how many bytes of a GPU nobody uses; on a CPU there is no limit."""
    if device.type == "cpu":
        return math.inf
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return free


def usual_sequences(gpu: str, memory: float) -> int:
    """Return how many sequences vLLM 0.32 samples at a time by default on a GPU of some bytes."""
    return 1024 if memory >= 70 * 2**30 and "A100" not in gpu else FEW_SEQUENCES


def sequences_on(device: torch.device) -> int:
    """Return how many sequences vLLM samples at a time by default on a device."""
    if device.type == "cpu":
        return FEW_SEQUENCES
    properties = torch.cuda.get_device_properties(device)
    return usual_sequences(properties.name, properties.total_memory)


def cache_bytes(
    model: Model, settings: EngineSettings, max_length: int, dtype: torch.dtype, free: float
) -> int:
    """Return the size of a rank's KV cache: room for all sequences, within its share of free bytes.

    ValueError if a sequence of max_length tokens does not fit.
    """
    token_bytes = bytes_of_token(model, settings.tensor_parallel, dtype)
    sequence_bytes = (max_length + 128) * token_bytes  # 128: a sequence ends within a block
    room = settings.cache_share * free
    if sequence_bytes > room:
        raise ValueError(
            f"a sequence of {max_length} tokens needs {sequence_bytes / 1e9:.2f} GB of KV cache, "
            f"but cache_share={settings.cache_share} of {free / 1e9:.2f} GB free is less; give "
            "--offload sampling, a larger --tensor-parallel or fewer tokens"
        )
    return int(min(settings.max_sequences * sequence_bytes, room))


def bytes_of_token(model: Model, tensor_parallel: int, dtype: torch.dtype) -> int:
    """Return the size of a token's keys and values on a rank."""
    text = model.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # ranks that share fewer heads of keys than they are hold copies of them
    n_heads = max(1, text.num_key_value_heads // tensor_parallel)
    return 2 * text.num_hidden_layers * n_heads * head_dim * dtype.itemsize


def image_options(processor, max_length: int, max_images: int) -> dict:
    """Return vLLM's options for images: the trainer's limits of size, and how many a prompt has.

    vLLM plans for the largest image: one that no prompt has room for is left out of the plan.
    """
    if find_spec("torchvision") is None:
        raise ValueError(
            "--engine vllm needs torchvision for images: pip install it, or take --engine torch"
        )
    smallest, largest = vision.pixel_limits(processor)
    pixels_per_token = (processor.patch_size * processor.merge_size) ** 2
    largest = max(smallest, min(largest, max_length * pixels_per_token))
    return {
        "limit_mm_per_prompt": {"image": max_images, "video": 0},
        "mm_processor_kwargs": {"min_pixels": smallest, "max_pixels": largest},
    }
