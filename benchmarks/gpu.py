"""What RLFR costs on one GPU, with random weights of a real shape: seconds, tokens a second, memory.

    python benchmarks/gpu.py --json runs/gpu.json                all jobs of PLAN, in an hour at most
    python benchmarks/gpu.py --jobs correct learn-1.5B           some of them
    python benchmarks/gpu.py --engine none                       without those that sample
    python benchmarks/gpu.py --part learn --shape 7B --layers 8  one part, in this process

Parts:
    correct   log-probs, entropies, latents, flow scores and gradients against float32 on the CPU
    learn     scoring and update of synthetic episodes, in variants
    profile   operators and kernels of forward and backward of one micro-batch
    offline   a step of the offline start
    steps     whole steps of train_rl.py: sync, roll out, score, update

Each job of the plan is a process with a timeout. One that fails is reported, the others go on, and
the exit code is 1. The file of figures is written after each job, with what a job that failed had
measured until then.

Operations a token: forward of the policy 2P, training 6P (recomputation is not counted), flow
forward 2F and training 6F a tap, F = (5*blocks + 7) * D^2. Utilisation is against the rate of a
large bfloat16 matrix product, measured in the same process.
"""

import repository  # noqa: F401

# isort: split
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen2Config, Qwen2ForCausalLM

import dense
import flow as fl
import rollout
import train_rl
from common import keep, machine
from infra import batching, parallel
from infra.errors import first_line, run
from infra.logprobs import CHUNK_WORK
from infra.metrics import read_metrics
from infra.runs import leave
from infra.settings import change
from policy import Policy, tap_layers
from rewards import Verdict
from worlds import toy


class Shape(NamedTuple):
    """Sizes of a decoder."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    width: int  # of the feed-forward part
    vocabulary: int
    tied: bool  # whether the head is the embedding
    flow_blocks: int


SHAPES = {  # of tests, of the embedded world, and of Qwen2.5
    "tiny": Shape(64, 4, 2, 2, 128, 512, True, 2),
    "toy": Shape(128, 4, 4, 4, 384, 272, True, 4),
    "small": Shape(512, 8, 8, 2, 1536, 32_000, True, 4),
    "1.5B": Shape(1536, 28, 12, 2, 8960, 151_936, True, 4),
    "7B": Shape(3584, 28, 28, 4, 18_944, 152_064, False, 6),
}


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    # One part, in this process; by default the jobs of PLAN, each in its own
    part: Literal["correct", "learn", "profile", "offline", "steps"] | None = None
    jobs: tuple[str, ...] | None = None  # Names in PLAN; by default all
    limit: float = 3600  # Seconds for all jobs together
    shape: str | None = (
        None  # Shape of the policy: tiny, toy, small, 1.5B or 7B; by default the plan's
    )
    layers: int | None = None  # Decoder layers; by default the shape's
    episodes: int = 128  # Episodes of the parts learn and offline
    prompts: int = 32  # Prompts of a whole step
    group_size: int = 8  # Responses a prompt
    prompt_tokens: int = 128  # Tokens of a prompt
    response_tokens: int = 1024  # Longest response; half of that on average in learn and offline
    steps: int = 3  # Whole steps; the first is a warm-up
    lora_rank: int = 0  # Rank of adapters that learn in whole steps; 0: all weights do
    engine: Literal["auto", "vllm", "torch", "none"] = "auto"  # What samples; none: no whole steps
    tokens_per_gpu: int = 16_384  # Tokens of a micro-batch
    # Trainer in host memory while the engine samples, or always
    offload: Literal["never", "sampling", "always"] = "never"
    compile: bool = True  # Measure the compiled variants, too
    json: str | None = None  # File for the figures


# ---- The plan
class Job(NamedTuple):
    """A part with its settings, in a process of its own."""

    part: str
    shape: str
    layers: int | None
    timeout: int  # seconds
    steps: int | None = None  # whole steps; by default the setting
    lora_rank: int = 0  # of adapters that learn in place of the weights


PLAN = {
    "correct": Job("correct", "small", None, 90),
    "learn-1.5B": Job("learn", "1.5B", None, 180),
    "steps-1.5B": Job("steps", "1.5B", None, 600),  # vLLM starts and both sides compile: minutes
    "profile-1.5B": Job("profile", "1.5B", None, 60),
    "offline-1.5B": Job("offline", "1.5B", None, 60),
    "learn-7B": Job("learn", "7B", 4, 180),  # with its optimiser, four layers fit on any GPU
    "adapters-7B": Job("steps", "7B", None, 2400, steps=30, lora_rank=32),
}


def run_plan(settings: Settings) -> dict:
    """Run the jobs one after the other; return the figures of each, or how it failed."""
    result = {"machine": machine(), "settings": asdict(settings), "jobs": {}}
    end = time.perf_counter() + settings.limit
    with tempfile.TemporaryDirectory() as folder:
        for name in settings.jobs or PLAN:
            job = PLAN[name]
            if job.part == "steps" and settings.engine == "none":
                continue
            print(f"\n==== {name}", flush=True)
            timeout = min(job.timeout, end - time.perf_counter())
            file = Path(folder) / f"{name}.json"
            result["jobs"][name] = run_job(job, settings, file, timeout)
            save(result, settings)
    return result


def run_job(job: Job, settings: Settings, file: Path, timeout: float) -> dict:
    """Run a job; return its figures, and under `error` why it ended too early, if it did."""
    chosen = replace(
        settings,
        part=job.part,
        jobs=None,
        shape=settings.shape or job.shape,
        layers=settings.layers or job.layers,
        steps=job.steps or settings.steps,
        lora_rank=job.lora_rank,
        json=str(file),
    )
    command = [sys.executable, __file__, *flags(chosen)]
    began = time.perf_counter()
    error = None
    try:
        done = subprocess.run(command, timeout=timeout)
        if done.returncode:
            error = f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        error = f"not done after {timeout:.1f} s"
    figures = {}
    if file.exists():
        figures = json.loads(file.read_text())
    figures["seconds"] = time.perf_counter() - began
    if error:
        print(f"failed: {error}", flush=True)
        figures["error"] = error
    return figures


def flags(settings: Settings) -> list[str]:
    """Return settings as command-line flags."""
    given = []
    for name, value in asdict(settings).items():
        flag = name.replace("_", "-")
        if value is True:
            given.append(f"--{flag}")
        elif value is False:
            given.append(f"--no-{flag}")
        elif value is not None:
            given += [f"--{flag}", str(value)]
    return given


def save(result: dict, settings: Settings) -> None:
    """Write the figures so far, if a file was asked for."""
    keep(result, settings.json)


# ---- Random models and episodes
def make_config(shape: Shape) -> Qwen2Config:
    """Return the configuration of a Qwen2 of this shape, with the embedded world's tokenizer."""
    tokenizer = toy.make_tokenizer()
    return Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.width,
        tie_word_embeddings=shape.tied,
        max_position_embeddings=4096,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype=torch.bfloat16,
    )


def make_model(shape: Shape, device: torch.device) -> Qwen2ForCausalLM:
    """Make a random model in bfloat16."""
    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM(make_config(shape)).to(torch.bfloat16)


def make_flow(shape: Shape) -> fl.Flow:
    """Make a flow with a random output layer, so that its scores depend on every weight."""
    torch.manual_seed(0)
    flow = fl.Flow(fl.FlowConfig(shape.hidden, n_blocks=shape.flow_blocks))
    for parameter in flow.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return flow


def make_episodes(settings: Settings, shape: Shape, count: int) -> list[rollout.Episode]:
    """Make random episodes, all right; lengths are even from a few tokens to the longest."""
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for i in range(count):
        n_response = max(1, settings.response_tokens * (i + 1) // count)
        n_tokens = settings.prompt_tokens + n_response
        ids = torch.randint(shape.vocabulary, (n_tokens,), generator=generator).tolist()
        episode = rollout.Episode(
            prompt_ids=ids[: settings.prompt_tokens],
            response_ids=ids[settings.prompt_tokens :],
            logp=[0.0] * n_response,
            finish_reason="stop",
            text="",
            verdict=Verdict(1.0, True, {}, None, "answer"),
        )
        episodes.append(episode)
    return episodes


def count_parameters(shape: Shape) -> tuple[int, int]:
    """Return the weights of the decoder's matrices, and of its head."""
    kv_width = shape.hidden * shape.kv_heads // shape.heads
    attention = shape.hidden * (2 * shape.hidden + 2 * kv_width)
    feed_forward = 3 * shape.hidden * shape.width
    return shape.layers * (attention + feed_forward), shape.vocabulary * shape.hidden


def operations(shape: Shape, n_tokens: float, n_response: float) -> dict[str, float]:
    """Return model operations of scoring and of the update, without those of attention itself."""
    body, head = count_parameters(shape)
    forward = 2 * (n_tokens * body + n_response * head)
    flow = (5 * shape.flow_blocks + 7) * shape.hidden**2
    n_taps = len(fl.FlowConfig(shape.hidden).percentiles)
    return {"score": forward + n_taps * 6 * flow * n_response, "update": 3 * forward}


# ---- Clocks
def synchronise() -> None:
    """Wait for the GPU, if there is one."""
    if parallel.DEVICE.type == "cuda":
        torch.cuda.synchronize()


def measure(work: Callable) -> tuple[object, dict[str, float]]:
    """Run work once; return its result, and its seconds and peak memory in GB (0 on a CPU)."""
    on_gpu = parallel.DEVICE.type == "cuda"
    synchronise()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = work()
    synchronise()
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return result, {"seconds": seconds, "peak_gb": peak}


def matrix_rate() -> float:
    """Return operations a second of a large matrix product in bfloat16."""
    n = 8192 if parallel.DEVICE.type == "cuda" else 512
    a = torch.randn(n, n, device=parallel.DEVICE, dtype=torch.bfloat16)
    b = torch.randn(n, n, device=parallel.DEVICE, dtype=torch.bfloat16)
    seconds = [measure(lambda: a @ b)[1]["seconds"] for _ in range(8)]
    return 2 * n**3 / statistics.median(seconds[2:])


# ---- Part: correct
# What the mean difference to float32 on the CPU may be, relative to the mean size; random weights
LIMITS = {"float32": 1e-3, "bfloat16": 0.1}


def check_correctness(settings: Settings, shape: Shape) -> dict:
    """Compare what training computes, on the device and in its dtypes, with float32 on the CPU."""
    model = make_model(shape, torch.device("cpu")).float()
    flow = make_flow(shape)
    episodes = make_episodes(replace(settings, response_tokens=128), shape, count=8)
    batch = batching.collate(episodes)
    expected = compute_figures(model, flow, batch, torch.device("cpu"), torch.float32)
    result = {"machine": machine(), "differences": {}}
    worst = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        got = compute_figures(model, flow, batch, parallel.DEVICE, dtype)
        rows = {key: compare(got[key], expected[key]) for key in expected}
        result["differences"][name] = rows
        worst[name] = max(row["relative_mean"] for row in rows.values())
        print_differences(name, rows)
    save(result, settings)
    for name, limit in LIMITS.items():
        assert worst[name] < limit, f"{name} is off by {worst[name]:.2g}, more than {limit}"
    return result


def compute_figures(
    model: Qwen2ForCausalLM,
    flow: fl.Flow,
    batch: batching.Batch,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Return what training computes of a batch, in float32 on the CPU."""
    policy = Policy(copy.deepcopy(model)).to(device, dtype)
    flow = copy.deepcopy(flow).to(device, dtype)
    tensors = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        tensors[field.name] = value.to(device) if isinstance(value, torch.Tensor) else value
    tensors["packing"] = batching.Packing(*[part.to(device) for part in batch.packing])
    batch = batching.Batch(**tensors)
    taps = tap_layers(policy.n_layers, flow.config.percentiles)
    depths = [tap / policy.n_layers for tap in taps]
    logp, entropy, latents = policy(batch, taps=taps)
    (logp.sum() + 0.1 * entropy.sum()).backward()
    gradients = [parameter.grad.float() for parameter in policy.parameters()]

    lengths = batch.response_mask.sum(dim=1).tolist()
    keys = [("benchmark", i) for i in range(len(lengths))]
    noise, _ = fl.draw(flow.config, keys, lengths, torch.device("cpu"))
    rows = fl.make_rows(flow.config, latents, depths, batch.attention_mask, batch.targets)
    by_tap, _ = fl.score_and_learn(CastInputs(flow, dtype), rows, noise.to(device), [0.8])
    score = by_tap.mean(dim=0)
    is_token = batch.attention_mask
    figures = {
        "logp": logp[batch.response_mask],
        "entropy": entropy[batch.response_mask],
        "flow score": score,
        "gradient norm": torch.nn.utils.get_total_norm(gradients),
    }
    for tap, latent in zip(taps, latents, strict=True):
        figures[f"latent {tap}"] = latent[is_token]
    return {name: value.detach().float().cpu() for name, value in figures.items()}


class CastInputs(torch.nn.Module):
    """A flow whose inputs are cast to the dtype of its weights, as FSDP does in training."""

    def __init__(self, flow: fl.Flow, dtype: torch.dtype):
        super().__init__()
        self.flow = flow
        self.dtype = dtype

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.flow(*(value.to(self.dtype) for value in inputs))


def compare(got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Return mean and largest difference, and the mean one relative to the mean size."""
    difference = (got - expected).abs()
    return {
        "mean": difference.mean().item(),
        "max": difference.max().item(),
        "relative_mean": (difference.mean() / expected.abs().mean()).item(),
    }


def print_differences(name: str, rows: dict[str, dict[str, float]]) -> None:
    """Print a table of differences."""
    print(f"{name} on {parallel.DEVICE}, difference to float32 on the CPU")
    print(f"{'':16}{'mean':>12}{'max':>12}{'mean/size':>12}")
    for key, row in rows.items():
        print(f"{key:16}{row['mean']:12.2e}{row['max']:12.2e}{row['relative_mean']:12.2e}")


# ---- Part: learn
class Trainer:
    """A random policy and flow with their optimisers, and synthetic episodes to learn from."""

    def __init__(self, settings: Settings, shape: Shape):
        self.episodes = make_episodes(settings, shape, settings.episodes)
        self.config = change(
            train_rl.Config(),
            train_batch=len(self.episodes),
            max_tokens=settings.response_tokens,
            tokens_per_gpu=settings.tokens_per_gpu,
        )
        dtype = parallel.compute_dtype("auto")
        self.policy = Policy(make_model(shape, parallel.DEVICE).train())
        parallel.shard(self.policy, self.policy.blocks, dtype)
        flow = make_flow(shape)
        flow_reward = dense.FlowReward(
            flow,
            shape.layers,
            self.config.flow_reward,
            self.config.flow_update,
            seed=0,
            group_size=settings.group_size,
        )
        dense.prepare(flow_reward, shape.layers, dtype, cpu_offload=False)
        models = train_rl.Models(self.policy, None, flow_reward, {})
        self.models = train_rl.with_learners(models, weight_decay=0.0)

    def micro_batches(self) -> Iterator[batching.Batch]:
        """Yield the micro-batches of scoring, the longest episodes first."""
        budget = self.config.compute.tokens_per_gpu
        for _, batch in batching.micro_batches(self.episodes, budget, rank=0, n_ranks=1):
            yield batch

    def learn(self) -> None:
        """Score and update once."""
        self.update(self.score())

    def score(self) -> train_rl.Experience:
        """Score all episodes; the flow takes a step of rate 0, which clears its gradient."""
        token_budget = self.config.compute.tokens_per_gpu
        experience = train_rl.score(self.models, self.episodes, 0, 1.0, token_budget)
        self.models.learners["flow"].step(0.0, 1.0)
        return experience

    def update(self, experience: train_rl.Experience) -> dict[str, float]:
        """Take one optimiser step of rate 0, so that all variants have the same weights."""
        advantage = torch.ones_like(experience.old_logp) * experience.mask
        return train_rl.update_policy(
            self.models, experience, advantage, self.config, step=0, lr=0.0
        )


@contextmanager
def padded(trainer: Trainer) -> Iterator[None]:
    """Give the decoder the rows with their padding."""
    trainer.policy.packs = False
    yield
    trainer.policy.packs = True


@contextmanager
def checkpointing(trainer: Trainer) -> Iterator[None]:
    """Recompute activations in the backward."""
    model = trainer.policy.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    yield
    model.gradient_checkpointing_disable()


@contextmanager
def compiled(trainer: Trainer) -> Iterator[None]:
    """Compile the parts of the decoder's layers, and what is done with a chunk of logits."""
    trainer.policy.compile_parts("on")
    yield
    for part in trainer.policy.layer_parts():
        del part.forward  # the class's own is left
    trainer.policy.chunk_work = CHUNK_WORK


@contextmanager
def small_batches(trainer: Trainer) -> Iterator[None]:
    """Take micro-batches of a quarter of the tokens: activations of all layers may then fit."""
    before = trainer.config
    trainer.config = change(before, tokens_per_gpu=before.compute.tokens_per_gpu // 4)
    yield
    trainer.config = before


# The first is what the others are compared with. Those that may not fit come last: a backward that
# runs out of memory leaves FSDP in disorder.
VARIANTS = {
    "checkpointing": [checkpointing],
    "with padding": [checkpointing, padded],
    "small batches": [checkpointing, small_batches],
    "compiled": [checkpointing, compiled],
    "small, all activations": [small_batches],
    "all activations": [],
}


def measure_learning(settings: Settings, shape: Shape) -> dict:
    """Measure scoring and update of the same episodes in all variants, and profile the first."""
    rate = matrix_rate()
    trainer = Trainer(settings, shape)
    n_response = sum(len(episode.response_ids) for episode in trainer.episodes)
    n_tokens = n_response + settings.prompt_tokens * len(trainer.episodes)
    work = operations(shape, n_tokens, n_response)
    n_padded = sum(batch.input_ids.numel() for batch in trainer.micro_batches())
    result = {
        "machine": machine(),
        "settings": asdict(settings),
        "rate": rate,
        "tokens": n_tokens,
        "padded_tokens": n_padded,
        "variants": {},
    }
    print(f"{shape}\n{machine()}\nbfloat16 matrix product: {rate / 1e12:.1f} TFLOP/s")
    print(f"{len(trainer.episodes)} episodes of {n_tokens} tokens, {n_padded} with padding")
    print_header()
    for name, changes in VARIANTS.items():
        if compiled in changes and not settings.compile:
            continue
        row = measure_variant(trainer, changes)
        for phase in ("score", "update"):
            if phase in row:
                row[phase]["tokens_per_second"] = n_tokens / row[phase]["seconds"]
                row[phase]["utilisation"] = work[phase] / row[phase]["seconds"] / rate
        result["variants"][name] = row
        print_variant(name, row)
        save(result, settings)
    return result


def measure_variant(trainer: Trainer, changes: Sequence[Callable]) -> dict:
    """Score and update under some changes, twice; return the figures of the second time."""
    with ExitStack() as stack:
        for change_trainer in changes:
            stack.enter_context(change_trainer(trainer))
        try:
            _, first = measure(trainer.learn)
            experience, score_figures = measure(trainer.score)
            metrics, update_figures = measure(lambda: trainer.update(experience))
        except torch.OutOfMemoryError as error:
            trainer.models.learners["policy"].optimizer.zero_grad()
            return {"error": first_line(error)}
    return {
        "warm_up_seconds": first["seconds"],
        "score": score_figures,
        "update": update_figures,
        "gradient_norm": metrics["policy/grad_norm"],
        "mean_logp": experience.old_logp[experience.mask].mean().item(),
        "mean_flow_score": experience.score[experience.mask].mean().item(),
    }


def print_header() -> None:
    """Print the head of the table of variants."""
    phase = f"{'tokens/s':>10}{'of rate':>9}{'GB':>6}"
    print(f"{'':24}{'score s':>9}{phase}{'update s':>10}{phase}{'gradient':>10}", flush=True)


def print_variant(name: str, row: dict) -> None:
    """Print a row of the table of variants."""
    if "error" in row:
        print(f"{name:24}{row['error']}", flush=True)
        return
    line = f"{name:24}"
    for phase, width in (("score", 9), ("update", 10)):
        figures = row[phase]
        line += f"{figures['seconds']:{width}.2f}{figures['tokens_per_second']:10.0f}"
        line += f"{figures['utilisation']:9.1%}{figures['peak_gb']:6.1f}"
    print(f"{line}{row['gradient_norm']:10.4f}", flush=True)


# ---- Part: profile
ATTENTION = ("flash", "fmha", "attention", "cudnn")  # in the names of kernels, in lower case


def profile_update(settings: Settings, shape: Shape) -> dict:
    """Profile forward and backward of one micro-batch: operators and kernels by their own time."""
    trainer = Trainer(settings, shape)
    with checkpointing(trainer):
        trainer.learn()
        batch = next(trainer.micro_batches())
        activities = [ProfilerActivity.CPU]
        if parallel.DEVICE.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities) as profiler:
            trainer.policy(batch).logp.sum().backward()
            synchronise()
    averages = profiler.key_averages()
    own_time = "self_cpu_time_total"
    if parallel.DEVICE.type == "cuda":
        own_time = "self_device_time_total"
    rows = []
    for event in averages:
        milliseconds = getattr(event, own_time) / 1e3
        rows.append({"name": event.key, "calls": event.count, "milliseconds": milliseconds})
    rows.sort(key=lambda row: row["milliseconds"], reverse=True)
    attention = [row for row in rows if any(word in row["name"].lower() for word in ATTENTION)]
    print(averages.table(sort_by=own_time, row_limit=30, max_name_column_width=90))
    print("attention:")
    for row in attention[:8]:
        print(f"{row['milliseconds']:10.2f} ms {row['calls']:5} calls  {row['name'][:90]}")
    result = {
        "machine": machine(),
        "shape_of_batch": list(batch.input_ids.shape),
        "rows": rows[:40],
        "attention": attention,
    }
    save(result, settings)
    return result


# ---- Part: offline
def measure_offline_start(settings: Settings, shape: Shape) -> dict:
    """Measure a step of the offline start: latents up to the last tap, loss, backward, AdamW."""
    dtype = parallel.compute_dtype("auto")
    policy = Policy(make_model(shape, parallel.DEVICE)).requires_grad_(False)
    parallel.shard(policy, policy.blocks, dtype)
    flow = make_flow(shape)
    parallel.shard(flow, (), dtype)
    learner = parallel.Learner(flow, (0.9, 0.999), 0.01)
    taps = tap_layers(policy.n_layers, flow.config.percentiles)
    depths = [tap / policy.n_layers for tap in taps]
    solutions = make_episodes(settings, shape, settings.episodes)
    result = {"machine": machine(), "settings": asdict(settings), "steps": []}

    def find_latents(batch: batching.Batch) -> list[torch.Tensor]:
        with torch.no_grad():
            return policy(batch, taps=taps, latents_only=True).latents

    def learn(batch: batching.Batch, latents: list[torch.Tensor]) -> int:
        rows = fl.make_rows(flow.config, latents, depths, batch.attention_mask, batch.targets)
        lengths = batch.response_mask.sum(dim=1).tolist()
        keys = [("benchmark", i) for i in range(len(lengths))]
        noise, z = fl.draw(flow.config, keys, lengths, parallel.DEVICE)
        return len(fl.matching_loss(flow, rows, noise, fl.draw_times(z, "random")))

    for _ in range(2):  # the first is a warm-up
        figures = {"latents": 0.0, "loss": 0.0, "peak_gb": 0.0}
        n_rows = 0
        parallel.begin_calls(flow)
        for _, batch in batching.micro_batches(solutions, settings.tokens_per_gpu, 0, 1):
            latents, watched = measure(partial(find_latents, batch))
            figures["latents"] += watched["seconds"]
            count, watched = measure(partial(learn, batch, latents))
            n_rows += count
            figures["loss"] += watched["seconds"]
            figures["peak_gb"] = max(figures["peak_gb"], watched["peak_gb"])
        _, watched = measure(lambda: parallel.end_calls(flow, True))
        figures["sum"] = watched["seconds"]
        _, watched = measure(partial(learner.step, 1e-4, 1.0, n_rows))
        figures["adamw"] = watched["seconds"]
        result["steps"].append(figures)
    n_tokens = sum(len(s.prompt_ids) + len(s.response_ids) for s in solutions)
    last = result["steps"][-1]
    seconds = last["latents"] + last["loss"] + last["sum"] + last["adamw"]
    result["tokens_per_second"] = n_tokens / seconds
    print(f"{shape}\n{machine()}\n{n_tokens} tokens, {n_tokens / seconds:.0f} tokens/s")
    print("  ".join(f"{name} {value:.3f}" for name, value in last.items()))
    save(result, settings)
    return result


# ---- Part: steps
def write_inputs(folder: Path, settings: Settings, shape: Shape) -> None:
    """Write a policy, a flow and problems, all random."""
    make_model(shape, parallel.DEVICE).save_pretrained(folder / "model")
    toy.make_tokenizer().save_pretrained(folder / "model")
    flow = make_flow(shape)
    (folder / "flow").mkdir()
    fl.save_flow(flow.config, flow.state_dict(), folder / "flow")
    with open(folder / "problems.jsonl", "w") as file:
        for i in range(settings.prompts):
            problem = f"{i:0{settings.prompt_tokens}d}"  # a byte is a token
            print(json.dumps({"problem": problem, "answer": "1"}), file=file)


def run_steps(settings: Settings, shape: Shape, folder: Path) -> list[dict]:
    """Run train_rl.py; return its metrics, a dict a step."""
    n_episodes = settings.prompts * settings.group_size
    config = change(
        train_rl.Config(),
        model=str(folder / "model"),
        data=str(folder / "problems.jsonl"),
        flow=str(folder / "flow"),
        template="none",
        folder=str(folder / "run"),
        prompts=settings.prompts,
        group_size=settings.group_size,
        train_batch=n_episodes,
        max_prompt_tokens=settings.prompt_tokens,
        max_tokens=settings.response_tokens,
        steps=settings.steps,
        lora_rank=settings.lora_rank,
        max_sequences=n_episodes,
        engine=settings.engine,
        tokens_per_gpu=settings.tokens_per_gpu,
        offload=settings.offload,
        flow_soft=1.0,  # it learns from all, whatever they answer
        grade_truncated=True,
        save_every=0,
    )
    train_rl.main(config)
    return parallel.on_first(lambda: read_metrics(folder / "run" / "metrics.jsonl"))


def medians(lines: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure over the steps that have it.

    A step without wrong responses, say, has no figure of them.
    """
    names = {name: None for line in lines for name in line}  # in their order
    return {name: statistics.median(line[name] for line in lines if name in line) for name in names}


def measure_steps(settings: Settings, shape: Shape) -> dict:
    """Measure whole steps: seconds, tokens a second and utilisation of each phase.

    With torchrun, on several GPUs of one node: tokens and utilisation are of all ranks together, in
    units of one GPU.
    """
    rate = matrix_rate()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(parallel.on_first(lambda: name))
        parallel.on_first(lambda: write_inputs(folder, settings, shape))
        lines = run_steps(settings, shape, folder)
    if not parallel.is_first():
        return {}
    figures = medians(lines[1:])
    n_episodes = settings.prompts * settings.group_size
    n_response = n_episodes * figures["length"]
    n_tokens = n_response + n_episodes * settings.prompt_tokens
    work = operations(shape, n_tokens, n_response)
    counted = {"roll_out": n_response, "score": n_tokens, "update": n_tokens}
    phases = {}
    print(f"{shape}\n{machine()}\n{n_episodes} episodes of {figures['length']:.0f} tokens")
    print(f"{'':10}{'seconds':>10}{'tokens/s':>12}{'utilisation':>13}")
    for phase in ("sync", "roll_out", "score", "verify", "update", "step"):
        seconds = figures[f"time/{phase}"]
        row = {"seconds": seconds}
        line = f"{phase:10}{seconds:10.2f}"
        if phase in counted:
            row["tokens_per_second"] = counted[phase] / seconds
            line += f"{row['tokens_per_second']:12.0f}"
        if phase in work:
            row["utilisation"] = work[phase] / seconds / rate
            line += f"{row['utilisation']:13.1%}"
        phases[phase] = row
        print(line)
    for name, value in figures.items():
        if name.startswith(("memory/", "mismatch/")):
            print(f"{name:24}{value:10.3f}")
    result = {
        "machine": machine(),
        "settings": asdict(settings),
        "rate": rate,
        "phases": phases,
        "figures": figures,
        "lines": lines,
    }
    save(result, settings)
    return result


PARTS = {
    "correct": check_correctness,
    "learn": measure_learning,
    "profile": profile_update,
    "offline": measure_offline_start,
    "steps": measure_steps,
}


def main(settings: Settings) -> dict:
    """Run one part in this process, or all jobs of the plan."""
    if settings.part is None:
        return run_plan(settings)
    # vLLM, where it is loaded, switches it off for the trainer, too
    torch.backends.cuda.enable_cudnn_sdp(False)
    parallel.start()
    name = settings.shape or "1.5B"
    if name not in SHAPES:
        raise ValueError(f"--shape {name}: expected one of {', '.join(SHAPES)}")
    shape = SHAPES[name]
    if settings.layers:
        shape = shape._replace(layers=settings.layers)
    return PARTS[settings.part](settings, shape)


def command() -> None:
    """Do what the command line asks for, and end the process."""
    figures = main(tyro.cli(Settings))
    failed = [name for name, job in figures.get("jobs", {}).items() if "error" in job]
    if failed:
        print(f"failed: {', '.join(failed)}")
    leave(1 if failed else 0)


if __name__ == "__main__":
    run(command)
