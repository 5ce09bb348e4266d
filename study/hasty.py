"""Wrong responses of a model, as many as a file has solutions, to fit a flow to.

python study/hasty.py --model FOLDER --data FILE --like FILE --folder F
"""

import repository  # noqa: F401

# isort: split
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import rollout
from engines.torch_engine import TorchEngine
from infra import errors, parallel
from infra.batching import keyed_seed
from infra.data import ProblemSettings, load_problems
from infra.files import written_whole
from infra.models import LoadingSettings, find_model
from infra.rows import read_rows
from rewards import Grader
from worlds import toy

LONGEST_PROMPT = 512  # tokens; no embedded world has longer ones


@dataclass(frozen=True)
class HastySettings:
    """Sample a model's wrong responses."""

    model: str  # Folder of the model
    data: str  # Problems
    like: str  # File with as many solutions as are wanted
    folder: str  # Where solutions.jsonl goes
    seed: int = 0  # Seed of the sampling


def write_hasty_solutions(settings: HastySettings) -> None:
    """Sample a response to each problem and write those that are wrong, in the order of problems."""
    parallel.start()
    rows = sample_wrong(settings)
    n_wanted = len(read_rows(settings.like))
    if not rows:
        raise ValueError(f"{settings.model} solves all of {settings.data}; expected some failures")
    with written_whole(Path(settings.folder, "solutions.jsonl")) as temporary:
        lines = [json.dumps(row) + "\n" for row in rows[:n_wanted]]
        temporary.write_text("".join(lines))
    print(f"{len(lines)} of {n_wanted} wrong responses to {settings.data} in {settings.folder}")


def sample_wrong(settings: HastySettings) -> list[dict]:
    """Return the problems to which a sampled response is wrong, each with it as its solution."""
    model = find_model(settings.model, LoadingSettings())
    problem_settings = ProblemSettings(
        template=toy.EVALUATE["template"],
        problem_column="problem",
        max_prompt_tokens=LONGEST_PROMPT,
    )
    problems = load_problems(settings.data, problem_settings, model)
    engine = TorchEngine(model, 256, parallel.DEVICE, torch.float32)
    requests = []
    for i, problem in enumerate(problems):
        seed = keyed_seed("hasty solutions", settings.seed, i)
        requests.append(rollout.Request(problem.prompt_ids, seed))
    sampling = rollout.Sampling(max_tokens=toy.EVALUATE["max_tokens"])
    episodes = engine.generate(requests, sampling)
    with Grader(toy.EVALUATE["reward"]) as grader:
        verdicts = grader.grade_all(problems, episodes)
    rows = []
    for problem, episode, verdict in zip(problems, episodes, verdicts, strict=True):
        if episode.finish_reason == "stop" and not verdict.correct:
            rows.append({"problem": problem.text, "solution": episode.text})
    return rows


if __name__ == "__main__":
    errors.run(lambda: write_hasty_solutions(tyro.cli(HastySettings)))
