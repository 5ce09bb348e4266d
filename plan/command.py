"""What a run would take of GPUs that are not there.

    python run.py plan --on 8xH100 --model Qwen2.5-7B
    python run.py plan --on 1xH200 --model FOLDER --lora-rank 32 --max-tokens 8192

The flags are those of train_rl.py and a few of its own. Of the model only the config.json is read. The
run's own code makes the models, shards them, scores and updates on tensors without numbers (tracing.py);
gpus.py and estimate.py have what was measured and what is assumed. A dense reward of a file is left
out, and so are images.
"""

from dataclasses import dataclass

import torch.distributed as dist

import train_rl
from engines.vllm_engine import usual_sequences
from infra import lora, memory
from infra.defaults import published_settings
from infra.models import LoadingSettings, Model, short_name
from infra.ranges import PositiveFloat, PositiveInt
from infra.settings import change, with_defaults
from plan import advice, estimate, trial
from plan.estimate import Phase
from plan.gpus import BESIDE, Machine, find_machine
from plan.models import find_model
from plan.tracing import Trace, start_ranks
from worlds import PRESETS

PART = 0.6  # of --max-tokens that a response has on average; assumed


@dataclass(frozen=True)
class Config(train_rl.Config):
    """Say what a run of train_rl.py would take of GPUs that are not there."""

    on: str = "8xH100"  # GPUs: a number and a kind
    prompt_tokens: PositiveInt = 150  # Tokens of a prompt on average
    response_tokens: PositiveInt | None = None  # Of a response; by default 0.6 of max_tokens
    # Response tokens a second that a GPU samples, if you know it; by default by its bandwidth
    sample_rate: PositiveFloat | None = None
    # As on a GPU
    compute: train_rl.TrainingComputeSettings = train_rl.TrainingComputeSettings(
        tokens_per_gpu=16_384
    )
    loading: LoadingSettings = LoadingSettings(dtype="bfloat16", max_pixels=501_760)


def main(config: Config) -> None:
    """Print the plan of a run."""
    machine = find_machine(config.on)
    config, model = resolve(config, machine)
    with Trace() as trace:
        models = trial.make_models(config, model)
        n_held = trace.held
        held = trial.held_by(models)
        n_parameters = count_weights(models.policy)
        n_dense = count_weights(models.dense.module) if models.dense else 0
        traced = trial.try_out(models, largest_shape(config), config, trace)
    phases = estimate.learning_phases(config, held, traced, n_held)
    roll_out = estimate.roll_out_phase(config, model, n_parameters, n_held, machine)
    print_head(config, model, n_parameters, n_dense, machine)
    print_memory(config, model, held, roll_out, phases=phases, machine=machine)
    if isinstance(roll_out, Phase):
        times = estimate.times_of_step(config, model, n_parameters, traced, roll_out.cache, machine)
        print_times(config, traced, times, machine)
    print(SOURCES)


def resolve(config: Config, machine: Machine) -> tuple[Config, Model]:
    """Check the settings and fill in what follows from the model; start the ranks."""
    if config.model in PRESETS["train_rl"]:
        raise ValueError(
            f"--model {config.model}: the embedded world runs on a CPU; name a model such as Qwen2.5-7B"
        )
    model = find_model(config.model, config.loading.trust_remote_code)
    config = with_defaults(config, **published_settings(model))
    if config.response_tokens is None:
        config = change(config, response_tokens=round(PART * config.sampling.max_tokens))
    if config.shaping.endswith(".py"):
        print(f"--shaping {config.shaping}: a file's reward is left out of the plan")
        config = change(config, shaping="none", dense=())
    # any flow has these shapes, and vLLM need not be here
    flow = "new" if config.shaping == "flow" else None
    config = change(config, flow=flow, flow_scope="response", engine="auto")
    start_ranks(machine.n_gpus)
    train_rl.check(config)
    train_rl.check_lengths(config, model)
    room = int(machine.gpu.memory)
    config = with_defaults(config, max_sequences=usual_sequences(machine.name, room))
    n_layers = memory.layers_to_recompute(config, model, machine.n_gpus, room)
    return with_defaults(config, recompute_layers=n_layers), model


def largest_shape(config: Config) -> trial.Shape:
    """Return the micro-batch that takes the most memory: the longest responses, a full budget.

    It has as many rows as the budget holds with prompts of the mean length, and no more than a rank
    gets of an optimiser step; longer prompts fill it up. A single row may exceed the budget.
    """
    budget = config.compute.tokens_per_gpu
    n_response = config.sampling.max_tokens
    longest = config.problems.max_prompt_tokens + n_response
    if longest > budget:
        return trial.Shape(1, longest - n_response, n_response)
    of_rank = config.optimisation.train_batch // dist.get_world_size()
    n_rows = max(1, min(of_rank, budget // (config.prompt_tokens + n_response)))
    return trial.Shape(n_rows, min(longest, budget // n_rows) - n_response, n_response)


def count_weights(module) -> int:
    """Return the number of a module's weights over all ranks, without those of adapters."""
    if module is None:
        return 0
    return sum(p.numel() for name, p in module.named_parameters() if not lora.is_adapter(name))


# ---- What is printed
def print_head(
    config: Config, model: Model, n_parameters: int, n_dense: int, machine: Machine
) -> None:
    """Print what is planned."""
    dense = f", {config.shaping} of {n_dense / 1e9:.2f}B" if n_dense else ""
    learns = "all weights learn"
    if config.optimisation.lora_rank:
        learns = f"adapters of rank {config.optimisation.lora_rank} learn"
    print(
        f"{short_name(model.path)}, {n_parameters / 1e9:.2f}B weights{dense}; {learns}; "
        f"{config.compute.recompute_layers} layers recompute activations\n{machine.n_gpus} x {machine.name} of {machine.gpu.memory / 1e9:.0f} GB; "
        f"micro-batches of {config.compute.tokens_per_gpu} tokens, rows of at most "
        f"{config.problems.max_prompt_tokens} + {config.sampling.max_tokens}"
    )


def print_memory(
    config: Config,
    model: Model,
    held: trial.Held,
    roll_out: Phase | str,
    phases: list[Phase],
    machine: Machine,
) -> None:
    """Print the memory of each phase, and what to lower where it does not fit."""
    room = machine.gpu.memory
    where = "in host memory" if config.compute.always_offloads else "on each GPU"
    parts = zip(held._fields, held, strict=True)
    stays = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts)
    print(f"\nheld {where}, in GB: {stays} (in the update)")
    print(
        f"{'GB a GPU':10}{'trainer':>9}{'work':>8}{'engine':>8}{'cache':>8}{'beside':>8}{'sum':>8}"
    )
    if isinstance(roll_out, str):
        print(f"roll out  does not fit: {roll_out}")
    else:
        phases = [roll_out, *phases]
    for phase in phases:
        figures = (phase.trainer, phase.work, phase.engine, phase.cache, BESIDE, phase.total)
        numbers = "".join(f"{value / 1e9:8.1f}" for value in figures)
        does = "fits" if phase.total <= room else "DOES NOT FIT"
        print(f"{phase.name:10} {numbers}  {does}")
    for phase in phases:
        if phase.total > room:
            print(
                f"{phase.name}: any of these helps: "
                f"{'; '.join(what_to_lower(config, model, phase, machine))}"
            )


def what_to_lower(config: Config, model: Model, phase: Phase, machine: Machine) -> list[str]:
    """Return the settings by which a phase takes less."""
    if phase.name == "roll out":
        return advice.for_rollout(config, machine.n_gpus)
    if phase.trainer + BESIDE > machine.gpu.memory:
        return advice.for_weights(config)
    return advice.for_update(config, model.text_config.num_hidden_layers)


def print_times(
    config: Config, traced: trial.Trial, times: estimate.Times, machine: Machine
) -> None:
    """Print the operations and the seconds of a step."""
    work = estimate.work_of_rank(config, traced, machine.n_gpus)
    n_episodes = config.sampling.prompts * config.sampling.group_size
    print(
        f"\na step of {n_episodes} episodes, {config.prompt_tokens} + {config.response_tokens} tokens "
        "on average (--prompt-tokens, --response-tokens)"
    )
    print(f"{'':10}{'PFLOP a GPU':>12}{'seconds':>9}")
    operations = {"score": work.score, "update": work.update}
    for name, seconds in zip(times._fields, times, strict=True):
        counted = f"{operations[name] / 1e15:12.2f}" if name in operations else " " * 12
        print(f"{name.replace('_', ' '):10}{counted}{seconds:9.1f}")
    rate = n_episodes * (config.prompt_tokens + config.response_tokens)
    rate /= times.step * machine.n_gpus
    print(f"{'step':10}{'':12}{times.step:9.1f}  {rate:,.0f} tokens a second and GPU")


SOURCES = """
counted: what is held, work, operations; by the run's own code on tensors without numbers, uncompiled
measured: the rates of score and update, on one H100 at widths of 1,536 and 3,584; the nearest is taken
by arithmetic: weights and cache of the engine
assumed: lengths, 4 GB beside the tensors, vLLM's graphs, seconds of sync and roll out (--sample-rate)
left out: grading, evaluation, images, the wait for the longest rank"""
