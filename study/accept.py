"""Can a world decide what a dense reward is worth? A world is accepted before arms run on it.

    python study/accept.py --worlds toy-form toy-content
    python study/accept.py --worlds toy-beyond:expert_wrong=0.5 --bases 2
    python study/accept.py --worlds toy-content --no-runs --scorers ridge flow     the cheap part
    python study/accept.py --render --json study/worlds.json      the tables of a file, again

A world decides if a perfect reward solves it and the outcome alone does not: on all base models but
one in four the share of right steps as a reward ends with an accuracy of at least 0.8, and on most of
them RLVR ends below 0.3. Both run through study.py, on seeds from 200 on, which nobody reports.

Beside this it is measured what is known without a reward, by scoring the untrained base's responses:

    a wrong step        AUC over steps, of the mean over a step's tokens; what is wrong is said by
                        label_steps() of worlds/toy.py. The first step of a response is left out: it has
                        nothing to repeat, and what it follows is the prompt
    a response that does not do all operations of its problem, against complete ones. Where the base
                        completes next to none, the world's own solutions stand in for them

each with a 95 % bootstrap interval over responses. 0.5 is chance, and a higher AUC means that what is
wrong has the lower reward. What counts tokens, or reads the base's log-probs, needs no latents: where it
is near 1, the world cannot say what latents are worth.

Runs and scores are kept in a folder: a command that was stopped goes on where it was. The JSON file
keeps what it holds of other worlds.
"""

import repository  # noqa: F401

# isort: split
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tyro

import rollout
import study
import train_rl
from common import machine, table
from figures import read_study
from flow_signal import auc, figure, resampling_weights
from infra import errors, parallel
from infra.data import Problem, load_problems
from infra.files import read_json, write_json
from infra.models import Model
from infra.ranges import PositiveInt, check_values
from infra.settings import change
from inspector import sample_and_score
from measures import last_accuracy, number
from methods import ARMS, PREPARATIONS, REWARDS, as_pairs
from rewards import Grader
from worlds import toy

FIRST_SEED = 200  # of the runs: neither reported nor chosen on
SOLVED = 0.8  # accuracy that a perfect reward must reach
MOST_UNSOLVED = 0.25  # share of base models on which it may fail to
UNSOLVED = 0.3  # accuracy below which RLVR has not solved a world
DECIDING = ("process", "rlvr")
SCORERS = {  # name -> file of study/rewards/ with settings of its own, or a flow of methods.py
    "2-gram of expert tokens": ("ngram.py", {"n": "2"}),
    "3-gram": ("ngram.py", {"n": "3"}),
    "4-gram": ("ngram.py", {"n": "4"}),
    "Mahalanobis": ("mahalanobis.py", {}),
    "nearest": ("nearest.py", {}),
    "ridge": ("ridge.py", {}),
    "whitened ridge": ("ridge.py", {"whiten": "True"}),
    "MLP": ("mlp.py", {}),
    "probe": ("probe.py", {}),
    "untrained flow": ("untrained_flow", {}),
    "flow": ("flow", {}),
    "flow, 5 x offline": ("flow_5x", {}),
    "flow, 20 x offline": ("flow_20x", {}),
    "flow of whitened residuals": ("whitened_flow.py", {}),
    "the same, 10 x its steps": ("whitened_flow.py", {"steps": "2000"}),
}


@dataclass(frozen=True)
class Settings:
    """Which worlds to examine, and how."""

    worlds: tuple[str, ...] = ("toy-form", "toy-content")  # As --world of study.py takes them
    bases: PositiveInt = 4  # Base models of each world
    steps: PositiveInt = 100  # RL steps of a run
    jobs: PositiveInt = 1  # Runs side by side
    n_responses: PositiveInt = 300  # Responses of each base, one a problem
    n_written: PositiveInt = 200  # The world's own solutions of other problems
    folder: str = "runs/accept"  # Where runs and scores are kept
    json: str = "runs/accept/worlds.json"  # File for the figures
    # Which of SCORERS to fit and measure; what earlier commands have measured stays
    scorers: tuple[str, ...] = tuple(SCORERS)
    runs: bool = True  # Run the arms; without, their figures are what there is of them
    render: bool = False  # Only print the tables of the file


# ---- Responses of a base, and what scorers say of them
class Responses(NamedTuple):
    """Responses with their labels; a step is a span of a response's tokens."""

    episodes: list[rollout.Episode]
    n_sampled: int  # the first ones; the others are the world's own solutions
    is_incomplete: np.ndarray  # (n,) bool
    # of the sampled ones but for their first, each with its response
    steps: list[tuple[int, toy.Step]]


def scoring_settings(world: toy.World, settings: Settings) -> train_rl.Config:
    """Return the settings with which a base's responses are sampled, one a problem, and scored."""
    own = {
        "model": world.path("model"),
        "data": world.path("train.jsonl"),
        "shaping": "none",
        "engine": "torch",
        "prompts": settings.n_responses,
        "group_size": 1,
        "baseline": "reinforce",
        "train_batch": settings.n_responses,
        "seed": FIRST_SEED,
    }
    return change(train_rl.Config(), **{**toy.PRESETS["train_rl"]["toy-sparse"], **own})


def sample(config: train_rl.Config, model: Model, n_written: int) -> Responses:
    """Sample responses of a base, and write solutions of problems that it was not asked."""
    problems = load_problems(config.data, config.problems, model)
    models = train_rl.make_models(config, model, is_flow_named=True)
    with Grader(config.reward, config.grading, config.sampling.max_tokens) as grader:
        sampled = sample_and_score(config, model, problems, models, grader).episodes
    asked = {episode.problem.text for episode in sampled}
    others = [problem for problem in problems if problem.text not in asked]
    written = []
    for problem in others[:n_written]:
        solution, _ = toy.solve(problem.text)
        written.append(make_episode(problem, solution, model))
    return label([*sampled, *written], len(sampled), model)


def make_episode(problem: Problem, solution: str, model: Model) -> rollout.Episode:
    """Return a solution that the world has written as an episode."""
    response_ids = model.tokenizer.encode(solution + toy.EOS)
    return rollout.stand_in(problem, response_ids, solution)


def label(episodes: list[rollout.Episode], n_sampled: int, model: Model) -> Responses:
    """Label responses, and the steps after the first of those that were sampled."""
    is_incomplete = []
    steps = []
    for i, episode in enumerate(episodes):
        # a character for each token
        characters = [model.tokenizer.decode([token])[:1] for token in episode.response_ids]
        text = "".join(characters)
        problem = episode.problem.text
        of_response = toy.label_steps(problem, text)
        done = [text[step.start + 1 : step.end].partition("=")[0] for step in of_response]
        is_incomplete.append(done != problem.rstrip(">").split()[1:])
        if i < n_sampled:
            steps += [(i, step) for step in of_response[1:]]
    return Responses(episodes, n_sampled, np.array(is_incomplete), steps)


def score(
    responses: Responses, names: Sequence[str], paths: dict, config: train_rl.Config, model: Model
) -> dict:
    """Return how well scorers tell what is wrong: AUCs of steps and of responses, by name.

    names: those of SCORERS that are asked; what the base itself says is always told
    paths: what the placeholders in settings stand for, `solutions` and the flows among them
    """
    models = train_rl.make_models(config, model, is_flow_named=True)
    logp, entropy, _ = score_tokens(models, responses, config)
    values = {
        "-log-prob of the base": [-of_tokens for of_tokens in logp],
        "entropy of the base": entropy,
        "shortness": [np.full(len(of_tokens), -len(of_tokens)) for of_tokens in logp],
    }
    for name in names:
        with_reward = change(config, **reward_settings(name, paths))
        models = train_rl.make_models(with_reward, model, is_flow_named=True)
        _, _, rewards = score_tokens(models, responses, config)
        values[name] = [-of_tokens for of_tokens in rewards]
    return {name: measure(of_scorer, responses) for name, of_scorer in values.items()}


def reward_settings(name: str, paths: dict) -> dict[str, object]:
    """Return the settings of train_rl.py that score with one of SCORERS."""
    what, own = SCORERS[name]
    if what.endswith(".py"):
        given = {"experts": paths["solutions"], **own}
        return {"shaping": str(REWARDS / what), "dense": as_pairs(given)}
    return {**ARMS["calibrated"].settings, "flow": paths[what]}


def score_tokens(
    models: train_rl.Models, responses: Responses, config: train_rl.Config
) -> tuple[list[np.ndarray], ...]:
    """Return log-probs, entropies and dense rewards of each response's tokens, (T,) each.

    The sampled responses are first: a reward may fit itself to the first that it sees.
    """
    found: tuple[list[np.ndarray], ...] = ([], [], [])
    n_sampled = responses.n_sampled
    for episodes in (responses.episodes[:n_sampled], responses.episodes[n_sampled:]):
        experience = train_rl.score(
            models,
            episodes,
            0,
            temperature=config.sampling.temperature,
            token_budget=config.compute.tokens_per_gpu,
        )
        rewards = experience.score
        if models.dense:
            rewards = models.dense.shape(rewards, experience.scored)
        by_kind = (experience.old_logp, experience.entropy, rewards)
        for values, tensor in zip(found, by_kind, strict=True):
            for row, episode in enumerate(episodes):
                values.append(tensor[row, : len(episode.response_ids)].cpu().numpy())
    return found


# ---- Figures
def describe(responses: Responses) -> dict:
    """Return counts of what there is to tell apart, and what the base achieves."""
    sampled = responses.episodes[: responses.n_sampled]
    is_wrong = [not step.is_right for _, step in responses.steps]
    return {
        "responses": len(sampled),
        "complete": int((~responses.is_incomplete[: responses.n_sampled]).sum()),
        "right": sum(episode.verdict.correct for episode in sampled),
        "steps": len(is_wrong),
        "wrong_steps": sum(is_wrong),
        "written": len(responses.episodes) - len(sampled),
    }


def measure(values: Sequence[np.ndarray], responses: Responses) -> dict:
    """Return the AUCs, with intervals, of values of tokens that are higher for what is wrong."""
    weight = resampling_weights(len(responses.episodes))
    of_response = np.array([of_tokens.mean() for of_tokens in values])
    of_steps = []
    for i, step in responses.steps:
        of_steps.append(values[i][step.start : step.end].mean())
    is_wrong = np.array([not step.is_right for _, step in responses.steps], dtype=bool)
    of_which = np.array([i for i, _ in responses.steps], dtype=int)
    return {
        "steps": figure(auc(np.array(of_steps), is_wrong, weight[:, of_which])),
        "responses": figure(auc(of_response, responses.is_incomplete, weight)),
    }


# ---- The runs, and the decision
def study_of(world: str, settings: Settings) -> study.Study:
    """Return the study whose runs decide: a seed for each base model."""
    first_seed = FIRST_SEED + -FIRST_SEED % settings.bases  # of the first base
    return study.Study(
        world=world,
        bases=settings.bases,
        arms=DECIDING,
        seeds=settings.bases,
        first_seed=first_seed,
        steps=settings.steps,
        jobs=settings.jobs,
        folder=str(Path(settings.folder, re.sub(r"[^\w.-]+", "-", world))),
    )


def read_accuracies(asked: study.Study) -> list[dict[str, float]]:
    """Return for each base the accuracy that each finished arm ends with."""
    accuracies: list[dict[str, float]] = [{} for _ in range(asked.bases)]
    if not asked.json_file.exists():
        return accuracies
    for run in read_study(asked.json_file)["runs"]:
        if run["status"] == "finished":
            accuracy = round(last_accuracy(run["series"]["correct"]), 4)
            accuracies[run["base"]][run["arm"]] = accuracy
    return accuracies


def decide(bases: Sequence[dict]) -> bool | None:
    """Return whether a world is accepted; None if a run is missing."""
    if any(arm not in base for base in bases for arm in DECIDING):
        return None
    n_failed = sum(base["process"] < SOLVED for base in bases)
    n_unsolved = sum(base["rlvr"] < UNSOLVED for base in bases)
    return n_failed <= MOST_UNSOLVED * len(bases) and n_unsolved > len(bases) / 2


def kept_scores(asked: study.Study, worlds: Sequence[toy.World], settings: Settings) -> list[dict]:
    """Return what is known of each base before the runs, which the study's folder keeps.

    Of the scorers that are asked, those that it lacks are fitted and measured.
    """
    sizes = f"{settings.n_responses}-{settings.n_written}"
    files = [Path(asked.folder, f"scores-{base}-{sizes}.json") for base in range(len(worlds))]
    kept = [read_json(file, "the scores of a base") if file.exists() else {} for file in files]
    missing = []
    for scored in kept:
        known = scored.get("scorers", {})
        missing.append([name for name in settings.scorers if name not in known])
    flows = {SCORERS[name][0] for names in missing for name in names} & PREPARATIONS.keys()
    if flows:
        study.prepare(sorted(flows), asked, worlds)
    found = study.find_paths(asked, worlds)
    for base, world in enumerate(worlds):
        if missing[base]:
            config, model = train_rl.resolve(scoring_settings(world, settings))
            responses = sample(config, model, settings.n_written)
            scorers = score(responses, missing[base], found[base], config, model)
            scorers = {**kept[base].get("scorers", {}), **scorers}
            kept[base] = {**describe(responses), "scorers": scorers}
            write_json(files[base], kept[base])
    return kept


def gather(asked: study.Study, worlds: Sequence[toy.World], scores: Sequence[dict]) -> dict:
    """Return all that is known of a world so far, and the decision."""
    bases = []
    for world, accuracy, scored in zip(worlds, read_accuracies(asked), scores, strict=True):
        bases.append({"world_seed": world.seed, **accuracy, **scored})
    return {
        "world": read_json(worlds[0].path("world.json"), "the settings of an embedded world"),
        "steps": asked.n_steps,
        "machine": machine(),
        "bases": bases,
        "accepted": decide(bases),
    }


# ---- Tables
def all_tables(file: str | Path) -> str:
    """Return the tables of a file."""
    found = read_json(file, "what was found of worlds")
    return "\n".join(tables(name, of_world) for name, of_world in found.items())


def tables(world: str, found: dict) -> str:
    """Return what was found of a world: the runs of each base, the scorers, and the decision."""
    rows = []
    for base in found["bases"]:
        row = [str(base["world_seed"])]
        row += [number(base.get(arm, np.nan)) for arm in DECIDING]
        for count, of in (
            ("right", "responses"),
            ("complete", "responses"),
            ("wrong_steps", "steps"),
        ):
            row.append(f"{base[count]} of {base[of]}" if count in base else "–")
        rows.append(row)
    head = ("world seed", *(f"`{arm}`, last 10 steps" for arm in DECIDING))
    head += ("right before", "complete before", "wrong steps before")
    by_base = table(head, rows)
    scorers = [base.get("scorers", {}) for base in found["bases"]]
    rows = []
    for name in dict.fromkeys(name for of_base in scorers for name in of_base):
        row = [name]
        for kind in ("steps", "responses"):
            estimates = [of_base[name][kind] if name in of_base else None for of_base in scorers]
            row.append(", ".join(map(as_text, estimates)))
        rows.append(row)
    verdict = {True: "accepted", False: "not accepted", None: "undecided, runs are missing"}
    parts = [f"**{world}**: {verdict[found['accepted']]}", by_base]
    if rows:
        parts.append(table(("scorer", "AUC, wrong steps", "AUC, incomplete responses"), rows))
    return "\n\n".join(parts) + "\n"


def as_text(estimate: Sequence[float] | None) -> str:
    """Return an AUC with its interval."""
    if estimate is None:
        return "–"
    value, low, high = estimate
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def main(settings: Settings) -> None:
    """Examine worlds one after the other, write what was found, and print its tables."""
    check_values(settings)
    unknown = [name for name in settings.scorers if name not in SCORERS]
    if unknown:
        raise ValueError(f"scorers={unknown}: expected some of {', '.join(SCORERS)}")
    file = Path(settings.json)
    if settings.render:
        print(all_tables(file))
        return
    found = read_json(file, "what was found of worlds") if file.exists() else {}
    parallel.start()
    for name in settings.worlds:
        asked = study_of(name, settings)
        worlds = study.find_worlds(asked)
        study.begin(asked, worlds)
        scores = kept_scores(asked, worlds, settings)
        found[name] = gather(asked, worlds, scores)
        write_json(file, found)
        if settings.runs:
            statuses = study.run_arms(asked, worlds)
            found[name] = gather(asked, worlds, scores)
            write_json(file, found)
            if set(statuses.values()) != {"finished"}:
                raise ValueError(f"not all runs in {asked.folder} have finished, see their .log")
        print(tables(name, found[name]))


if __name__ == "__main__":
    errors.run(lambda: main(tyro.cli(Settings)))
