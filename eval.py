"""Accuracy of a model on a problem file, with 95 % intervals over problems.

    python eval.py --model runs/rl-toy-flow/policy --data runs/toy/test.jsonl --template none
    python eval.py --model Qwen2.5-Math-1.5B --data math500.jsonl --samples 4 --temperature 0.6
pass@1 is the mean over problems of the mean over samples. With --out, one line a sample goes to samples.jsonl.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

import parallel
import rollout
import toy
from flow import keyed_seed
from parallel import is_first, on_first, start
from rewards import Grader
from run import check_positive, launch, with_defaults, written_whole


@dataclass(frozen=True)
class Config(rollout.Sampler):
    """Settings of an evaluation."""

    split: str = "test"  # Split of a hub data set
    answer_column: str = "answer"  # Column with the answer, or a list of accepted answers
    reward: str = "binary"  # Reward: binary, official, or a Python file with reward(problem, response)
    samples: int = 1  # Responses a problem
    temperature: float = 0.0  # Sampling temperature; 0 is greedy
    top_p: float = 1.0  # Nucleus of the sampling
    out: str | None = None  # Folder for samples.jsonl and summary.json; by default only the table is printed
    seed: int = 0  # Seed of the sampling


def bootstrap_interval(values: Sequence[float], seed: int = 0, n_resamples: int = 10_000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, resampling values (one a problem)."""
    values = np.asarray(values, dtype=float)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(0, len(values), (100, len(values)))].mean(axis=1) for _ in range(n_resamples // 100)]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def evaluate(engine, problems: Sequence[rollout.Problem], grader: Grader, sampling: rollout.Sampling, seed: int = 0):
    """Sample and grade every problem; all ranks together.

    Returns figures (mean accuracy, that is pass@1, its 95 % interval low and high, mean response length, share cut off)
    and one record a sample.
    """
    seeds = [keyed_seed("evaluation", seed, problem.id) for problem in problems]
    prompts = [problem.prompt_ids for problem in problems]
    expected, images = [len(prompt) for prompt in prompts], [problem.images for problem in problems]
    episodes = rollout.generate_on_all_ranks(engine, prompts, sampling, seeds, expected, images)
    verdicts = rollout.grade_on_all_ranks(grader, problems, episodes)()
    correct = np.array([verdict.correct for verdict in verdicts], dtype=float).reshape(len(problems), sampling.n)
    low, high = bootstrap_interval(correct.mean(axis=1))
    figures = {"mean": float(correct.mean()), "low": low, "high": high, "problems": len(problems), "samples": sampling.n}
    figures["length"] = float(np.mean([len(episode.response_ids) for episode in episodes]))
    figures["truncated"] = float(np.mean([episode.finish_reason == "length" for episode in episodes]))
    records = []
    for i, (episode, verdict) in enumerate(zip(episodes, verdicts, strict=True)):
        problem = problems[i // sampling.n]
        asked = {"id": problem.id, "problem": problem.text, "answer": problem.answer, "response": episode.text}
        records.append(
            asked | verdict._asdict() | {"finish_reason": episode.finish_reason, "tokens": len(episode.response_ids)}
        )
    return figures, records


def table(rows: dict[str, dict[str, float]]) -> str:
    """Lay out figures of evaluate(), one row each, for the screen."""
    lines = [f"{'':18}{'pass@1':>8}{'95 % interval':>18}{'problems':>10}{'samples':>9}{'length':>8}{'cut':>7}"]
    for name, row in rows.items():
        interval, counts = f"{100 * row['low']:.1f} – {100 * row['high']:.1f}", f"{row['problems']:>10}{row['samples']:>9}"
        lines.append(f"{name:18}{row['mean']:>8.1%}{interval:>18}{counts}{row['length']:>8.1f}{row['truncated']:>7.1%}")
    return "\n".join(lines)


def main(config: Config) -> None:
    """Evaluate a model and print the table."""
    start()
    check_positive(config, "samples", "max_tokens", "max_prompt_tokens", "top_p", "max_sequences", "tensor_parallel")
    rollout.check_engine(config, dist.get_world_size())
    if config.samples > 1 and config.temperature == 0:
        raise ValueError(f"samples={config.samples} at temperature 0 are copies; raise --temperature, or take one sample")
    if on_first(lambda: config.out and Path(config.out).exists()):
        raise ValueError(f"--out {config.out} exists already; name a new folder")
    name = config.model
    if config.model in toy.WORLDS:
        world = on_first(lambda: toy.make(toy.WORLDS[config.model]))
        name, config = world.path("model"), with_defaults(config, data=world.path("test.jsonl"))
    model = rollout.find_model(name, config.trust_remote_code, config.min_pixels, config.max_pixels)
    if config.data is None:
        raise ValueError("no data given; expected --data with problems (columns problem and answer)")
    config = rollout.fill_in(config, model)
    problems = rollout.load_problems(config.data, config, model.tokenizer, model.processor)
    engine = rollout.make_engine(model, config, parallel.DEVICE, parallel.compute_dtype(config.dtype))
    sampling = rollout.Sampling(config.samples, config.temperature, config.max_tokens, config.top_p)
    with Grader(config.reward) as grader:
        figures, records = evaluate(engine, problems, grader, sampling, config.seed)
    if not is_first():
        return
    print(table({Path(config.data).stem: figures}))
    if config.out:
        with written_whole(Path(config.out)) as folder:
            (folder / "samples.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
            (folder / "summary.json").write_text(json.dumps({"config": asdict(config)} | figures, indent=1))


if __name__ == "__main__":
    launch(main, Config, toy.PRESETS["eval"])
