"""The numbers of docs/walkthrough.md: one problem of the embedded world, from prompt to gradient.

    python benchmarks/walkthrough.py              the page with your machine's numbers, in runs/
    python benchmarks/walkthrough.py --bases 4    how some of them vary over base models, a line each
    python benchmarks/walkthrough.py --tracked    docs/walkthrough.json, and its tables in the page
    python benchmarks/walkthrough.py --check      fails if these tables are not those of the figures

It makes the embedded world and its flow as `python train_rl.py` does, or takes those that are there
in runs/, and does by itself what the first step of training does with its first problem. The base
models of --bases are those of worlds with other seeds, whose first problems are others.
"""

import repository  # noqa: F401

# isort: split
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

import dense
import flow as fl
import rlfr
import rollout
import train_flow
import train_rl
from common import code, number, put_tables, relink, table
from engines.torch_engine import TorchEngine
from infra import batching, errors, parallel
from infra.data import Problem, load_problems
from infra.defaults import published_settings
from infra.models import Model
from infra.ranges import PositiveInt, check_values
from infra.settings import change
from pages.describe import token_texts
from policy import Policy, load_policy, tap_layers
from rewards import Grader
from worlds import toy

DOCS = Path(__file__).parents[1] / "docs"
OWN = Path("runs", "walkthrough")  # where a reader's page goes
N_SHOWN = 3  # dimensions of a vector that the page shows


@dataclass(frozen=True)
class Settings:
    """Make the numbers of the walkthrough, or check that the page has them."""

    bases: PositiveInt | None = (
        None  # Print some numbers of so many base models in place of the page
    )
    tracked: bool = False  # Rewrite docs/walkthrough.md and its figures, which the repository keeps
    check: bool = False  # Write nothing: fail if that page's tables are not those of its figures


# ---- The walk: what a step of training does, for one problem
def walk(config: train_rl.Config) -> dict:
    """Return what the first step of training computes of its first problem, piece by piece.

    config: settings of train_rl.py with --prompts 1, without --flow-scope expert
    """
    parallel.start()
    config, model = train_rl.resolve(config)
    problems = load_problems(config.data, config.problems, model)
    policy = load_policy(model.path).to(parallel.DEVICE)
    n_blocks = published_settings(model)["flow_blocks"]
    flow = dense.make_flow(
        config.flow, config.flow_reward, model, n_blocks=n_blocks, seed=config.seed
    ).to(parallel.DEVICE)
    episodes = sample_group(config, model, problems)

    batch = batching.collate(episodes)
    taps = tap_layers(policy.n_layers, flow.config.percentiles)
    with torch.no_grad():
        logp, entropy, latents = policy(batch, config.sampling.temperature, taps)
    points = flow_points(config, flow, batch, latents, [tap / policy.n_layers for tap in taps])
    rewards = torch.tensor([episode.verdict.reward for episode in episodes])
    outcome = rlfr.outcome_advantage(rewards, len(rewards), config.advantage.baseline)
    shaped = shape(config, batch, points["score"], outcome)
    chosen = choose_response(episodes)
    length = len(episodes[chosen].response_ids)
    token = int(points["score"][chosen, :length].argmax())  # the one that deviates most
    return {
        "problem": episodes[0].problem.text,
        "answer": episodes[0].problem.answer,
        "prompt_ids": episodes[0].prompt_ids,
        "responses": [episode.text for episode in episodes],
        "verdicts": [episode.verdict.kind for episode in episodes],
        "rewards": rewards.tolist(),
        "outcome": outcome.tolist(),
        "chosen": chosen,
        "token": token,
        "taps": taps,
        "n_layers": policy.n_layers,
        "dim": flow.config.dim,
        "time": config.flow_reward.reward_times[0],
        "tokens": token_columns(
            model.tokenizer, episodes[chosen], chosen, logp, entropy, points, shaped
        ),
        "at_taps": points_at(points, batch, chosen, token),
        **gradients(config, policy, batch, shaped["advantage"], logp),
    }


def sample_group(
    config: train_rl.Config, model: Model, problems: list[Problem]
) -> list[rollout.Episode]:
    """Sample and grade the responses to the first problem of the first step."""
    engine = TorchEngine(model, 256, parallel.DEVICE, torch.float32)
    lengths = torch.zeros(len(problems))
    with Grader(config.reward, config.grading, config.sampling.max_tokens) as grader:
        sampler = rollout.Sampler(
            engine, grader, problems, lengths, settings=config.sampling, seed=config.seed
        )
        episodes, _ = sampler.roll_out(0)
        sampler.verify(episodes)
    return episodes


def choose_response(episodes: list[rollout.Episode]) -> int:
    """Return the first response that is not right, or else the first one."""
    wrong = [i for i, episode in enumerate(episodes) if not episode.verdict.correct]
    return wrong[0] if wrong else 0


@torch.no_grad()
def flow_points(
    config: train_rl.Config,
    flow: fl.Flow,
    batch: batching.Batch,
    latents: list,
    depths: list[float],
) -> dict[str, torch.Tensor]:
    """Return the flow's inputs and outputs for each row, and the deviation of each token.

    Vectors are (L, M, D) for the first context mode; deviation is (L, M), score (B, T).
    """
    rows = fl.make_rows(flow.config, latents, depths, batch.attention_mask, batch.targets)
    rows = flow.standardise(rows)
    lengths = batch.response_mask.sum(dim=1).tolist()
    keys = [("flow noise", config.seed, 0, index) for index in range(len(lengths))]
    noise, _ = fl.draw(flow.config, keys, lengths, parallel.DEVICE)
    x_0 = noise[rows.exists]
    t = torch.full((len(x_0),), config.flow_reward.reward_times[0])
    x_t, u = fl.interpolate(rows.x_1, x_0, t)
    v = flow(x_t, t, rows.context, rows.depth[rows.taps()])
    delta = (v - u).square().mean(dim=-1)
    shape = (len(latents), -1, flow.config.dim)
    vectors = {"x_1": rows.x_1, "context": rows.context, "x_0": x_0, "x_t": x_t, "u": u, "v": v}
    points = {name: values.view(shape) for name, values in vectors.items()}
    deviation = fl.deviation_score(delta[None], [config.flow_reward.reward_times[0]])
    by_tap = rows.per_tap(deviation)
    return {
        **points,
        "delta": rows.per_tap(delta),
        "deviation": by_tap,
        "score": batch.unflatten(by_tap.mean(dim=0)),
    }


def points_at(points: dict, batch: batching.Batch, row: int, token: int) -> list[dict]:
    """Return the flow's inputs and outputs at one token of a row, for each tap."""
    lengths = batch.response_mask.sum(dim=1).tolist()
    place = sum(lengths[:row]) + token
    at_taps = []
    for tap in range(len(points["delta"])):
        at_tap = {}
        for name in ("x_1", "context", "x_0", "x_t", "u", "v"):
            at_tap[name] = points[name][tap, place, :N_SHOWN].tolist()
        at_tap["delta"] = points["delta"][tap, place].item()
        at_tap["deviation"] = points["deviation"][tap, place].item()
        at_taps.append(at_tap)
    return at_taps


def shape(
    config: train_rl.Config, batch: batching.Batch, score: torch.Tensor, outcome: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Return what shaping makes of scores, (B, T) each, from the min-max to the advantage."""
    settings = config.flow_reward
    mask = batch.response_mask
    normalised = rlfr.normalise(score, mask, settings.flow_bilateral)
    selected = rlfr.select(
        normalised, settings.flow_threshold, settings.flow_top_k, settings.flow_bilateral
    )
    flow_reward = -config.dense_reward.dense_coef * selected
    returns = rlfr.token_returns(flow_reward, mask, config.dense_reward.gamma)
    return {
        "normalised": normalised,
        "selected": selected,
        "dense_reward": flow_reward,
        "returns": returns,
        "advantage": outcome[:, None] * mask + returns,
    }


def token_columns(
    tokenizer, episode: rollout.Episode, row: int, logp, entropy, points: dict, shaped: dict
) -> dict[str, list]:
    """Return the columns of the table of tokens of a response."""
    length = len(episode.response_ids)
    columns = {"logp": logp, "entropy": entropy, "score": points["score"], **shaped}
    return {
        "ids": episode.response_ids,
        "texts": token_texts(tokenizer, episode.response_ids),
        **{name: values[row, :length].tolist() for name, values in columns.items()},
    }


def gradients(
    config: train_rl.Config, policy: Policy, batch: batching.Batch, advantage, old_logp
) -> dict[str, float]:
    """Return the loss of the group, and the norm of its gradient by the policy's weights."""
    settings = config.optimisation
    mask = batch.response_mask
    logp = policy(batch, config.sampling.temperature).logp
    loss, _ = rlfr.policy_loss(
        logp, old_logp, advantage, mask, loss=settings.loss, clip=settings.clip
    )
    n_episodes = len(mask)
    weights = rlfr.token_weights(
        mask, settings.normalisation, n_episodes, int(mask.sum()), config.sampling.max_tokens
    )
    total = (loss * weights).sum()
    total.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in policy.parameters()])
    return {"loss": total.item(), "gradient_norm": norm.item(), "n_episodes": n_episodes}


# ---- The page's tables
def vector(values: list[float]) -> str:
    """Format the first numbers of a vector."""
    return f"({', '.join(f'{value:.3f}' for value in values)}, …)".replace("-", "−")


def render(figures: dict) -> dict[str, str]:
    """Return the page's tables by name."""
    return {
        "prompt": prompt_table(figures),
        "responses": responses_table(figures),
        "sampled": columns_table(figures, {"id": "ids", "log-prob": "logp", "entropy": "entropy"}),
        "taps": taps_table(figures),
        "shaping": columns_table(
            figures,
            {
                "score": "score",
                "min-max": "normalised",
                "kept": "selected",
                "flow reward": "dense_reward",
            },
        ),
        "advantages": columns_table(
            figures, {"flow reward": "dense_reward", "return": "returns", "advantage": "advantage"}
        ),
        "loss": loss_table(figures),
    }


def prompt_table(figures: dict) -> str:
    """Lay out the problem and its prompt."""
    ids = " ".join(map(str, figures["prompt_ids"]))
    rows = [["problem", f"`{figures['problem']}`"], ["right answer", figures["answer"]]]
    rows += [["prompt ids", ids], ["how many", str(len(figures["prompt_ids"]))]]
    return table(["", ""], rows)


def responses_table(figures: dict) -> str:
    """Lay out the responses of the group, with reward and outcome advantage."""
    rows = []
    for i, text in enumerate(figures["responses"]):
        name = f"**{i}**" if i == figures["chosen"] else str(i)
        reward = number(figures["rewards"][i])
        outcome = number(figures["outcome"][i])
        rows.append([name, f"`{text}`", figures["verdicts"][i], reward, outcome])
    return table(["", "response", "verdict", "reward", "outcome advantage"], rows)


def columns_table(figures: dict, columns: dict[str, str]) -> str:
    """Lay out columns of the chosen response, a token a row."""
    tokens = figures["tokens"]
    rows = []
    for k, text in enumerate(tokens["texts"]):
        values = [tokens[name][k] for name in columns.values()]
        cells = [str(value) if isinstance(value, int) else number(value) for value in values]
        rows.append([str(k), code(text), *cells])
    return table(["k", "token", *columns], rows)


def taps_table(figures: dict) -> str:
    """Lay out what the flow takes and gives at the chosen token, a tap a column."""
    head = [""]
    for tap in figures["taps"]:
        head.append(f"layer {tap} of {figures['n_layers']}, depth {tap / figures['n_layers']:.2f}")
    rows = []
    names = {
        "context": "context, latent at k − 1",
        "x_1": "`x_1`, latent at k",
        "x_0": "noise `x_0`",
    }
    names |= {"x_t": "`x_t`", "u": "`u`", "v": "`v`"}
    for name, title in names.items():
        rows.append([title, *[vector(at_tap[name]) for at_tap in figures["at_taps"]]])
    for name, title in {"delta": "`delta`", "deviation": "`t/(1−t) · delta`"}.items():
        rows.append([title, *[number(at_tap[name]) for at_tap in figures["at_taps"]]])
    return table(head, rows)


def loss_table(figures: dict) -> str:
    """Lay out the loss of the group."""
    rows = [["episodes of the mini-batch here", str(figures["n_episodes"])]]
    rows += [["loss", number(figures["loss"])], ["gradient norm", number(figures["gradient_norm"])]]
    return table(["", ""], rows)


def write_page(figures: dict, folder: Path) -> Path:
    """Write figures, and the page with their tables, into a folder; return the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "walkthrough.json").write_text(json.dumps(figures, indent=1))
    page = put_tables((DOCS / "walkthrough.md").read_text(encoding="utf-8"), render(figures))
    path = folder / "walkthrough.md"
    path.write_text(relink(page, DOCS, folder), encoding="utf-8")
    return path


# ---- Other base models
def settings_of_base(seed: int) -> train_rl.Config:
    """Return the settings of the walk on the base model of a world's seed, made if need be."""
    preset = toy.PRESETS["train_rl"]["toy"]
    config = change(train_rl.Config(), **preset)
    config = change(config, prompts=1, train_batch=preset["group_size"])
    if seed == 0:
        return config
    world = toy.make(toy.World(f"runs/toy-{seed}", seed=seed))
    run = Path(f"runs/flow-toy-{seed}")
    if not (run / "flow").exists():
        start = change(train_flow.Config(), **toy.PRESETS["train_flow"]["toy"], folder=str(run))
        train_flow.main(change(start, model=world.path("model"), data=world.path("expert.jsonl")))
    data = {"data": world.path("train.jsonl"), "eval_data": (world.path("test.jsonl"),)}
    return change(config, model=world.path("model"), flow=str(run / "flow"), **data)


def print_bases(n_bases: int) -> None:
    """Print some numbers of the walk on base models, a line each."""
    print("seed   right of 8   least score   largest score   most penalised   loss   gradient norm")
    for seed in range(n_bases):
        figures = walk(settings_of_base(seed))
        scores = figures["tokens"]["score"]
        text = figures["tokens"]["texts"][figures["token"]]
        line = f"{seed:4}{sum(figures['rewards']):13.0f}{min(scores):14.1f}{max(scores):16.0f}"
        print(f"{line}{text:>17}{figures['loss']:7.4f}{figures['gradient_norm']:16.2f}", flush=True)


def main(settings: Settings) -> int:
    """Write figures and the page with their tables, or check the tables; return the exit code."""
    check_values(settings)
    if settings.check:
        page = (DOCS / "walkthrough.md").read_text(encoding="utf-8")
        figures = json.loads((DOCS / "walkthrough.json").read_text())
        return int(put_tables(page, render(figures)) != page)
    if settings.bases:
        print_bases(settings.bases)
        return 0
    figures = walk(settings_of_base(0))
    print(f"open {write_page(figures, DOCS if settings.tracked else OWN)}")
    return 0


if __name__ == "__main__":
    errors.run(lambda: sys.exit(main(tyro.cli(Settings))))
