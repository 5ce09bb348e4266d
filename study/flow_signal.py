"""What the flow's score knows: does it tell wrong steps from right ones, short work from careful?

    python study/flow_signal.py                                figures and tables, into runs/signal
    python study/flow_signal.py --render study/signal.json      the tables of a file, again

In the embedded worlds it is known which steps of a response are right. The base policy answers
training problems; flows that were fitted in different ways score the answers. In the sparse world,
where the base hardly ever completes a chain, the world's own solutions stand in for complete ones. The figures, each
with a 95 % bootstrap interval over problems:

    AUC of the score for wrong against right steps: the chance that a wrong one scores higher. What
        is scored is the result of a step, `2` in `7+5=2`, where all steps before it are right
    AUC for short responses, which skip steps of the chain or idle in their place, against complete
        ones, by the mean over a response's tokens
    excess over held-out expert tokens, in their standard deviations
    correlation of two scorings with different noise
    the same along a run of train_rl.py, with the flow that it updated and with the offline one

Responses and flows are kept in a folder: a command that was stopped goes on where it was.
study/text_signal.py asks the same of a real language model.
"""

import repository  # noqa: F401

# isort: split
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro

import flow as fl
import rollout
import train_flow
import train_rl
from common import machine
from engines.torch_engine import TorchEngine
from infra import batching, parallel
from infra.batching import keyed_seed
from infra.data import ProblemSettings, load_problems
from infra.errors import run
from infra.files import need_keys, read_json, written_whole
from infra.models import LoadingSettings, find_model
from infra.rows import read_rows
from infra.settings import change
from infra.solutions import load_solutions
from policy import Policy, load_policy, tap_layers
from worlds import find_world, toy

TIMES = (0.2, 0.5, 0.8)
PUBLISHED = TIMES.index(0.8)  # the time of the published score
PERCENTILES = fl.FlowConfig(dim=1).percentiles  # of the policy's depth: where it is tapped
N_RESAMPLES = 1000
MAX_TOKENS = 96  # of a response, as in training
EPOCHS = 4  # passes of an offline start of amount 1; the worlds' own default is three times that
TOKEN_BUDGET = 4096  # tokens of a micro-batch


@dataclass(frozen=True)
class Settings:
    """What to measure."""

    worlds: tuple[str, ...] = ("toy", "toy-sparse")  # Embedded worlds
    n_responses: int = 1000  # Responses of the base policy, one a problem
    n_written: int = 300  # The world's own solutions that stand in where the base completes none
    # Training of the flow, in multiples of EPOCHS passes; 0 is an untrained flow
    amounts: tuple[int, ...] = (0, 1, 5, 20)
    draws: tuple[int, ...] = (1, 4, 16)  # Draws of noise that a score is averaged over
    rl_steps: int = 60  # Steps of the run along which the score drifts; 0: no run
    rl_responses: int = 400  # Responses of each of its policies
    folder: str = "runs/signal"  # Where responses and flows are kept
    json: str | None = None  # File for the figures
    render: str | None = None  # Only print the tables of this file


# ---- Statistics: arrays over R resamples, of which the first is the sample itself
def resampling_weights(n_units: int) -> np.ndarray:
    """Return how often each unit is drawn in each resample, (R, n_units); the first row is 1s."""
    generator = np.random.default_rng(0)
    share = np.full(n_units, 1 / n_units)
    draws = generator.multinomial(n_units, share, size=N_RESAMPLES)
    return np.vstack([np.ones(n_units), draws])


def auc(score: np.ndarray, is_positive: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the chance that a positive item scores higher than a negative one, ties half: (R,).

    score and is_positive are (n,), weight (R, n). NaN where a resample lacks one of the kinds.
    """
    if len(score) == 0:
        return np.full(len(weight), np.nan)
    order = np.argsort(score, kind="stable")
    ordered = score[order]
    is_new = np.append(True, ordered[1:] != ordered[:-1])
    starts = np.flatnonzero(is_new)  # of runs of equal scores
    of_positives = weight[:, order] * is_positive[order]
    of_negatives = weight[:, order] * ~is_positive[order]
    positive = np.add.reduceat(of_positives, starts, axis=1)
    negative = np.add.reduceat(of_negatives, starts, axis=1)
    below = negative.cumsum(axis=1) - negative / 2
    n_pairs = positive.sum(axis=1) * negative.sum(axis=1)
    return divide((positive * below).sum(axis=1), n_pairs)


def mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return weighted means of values (n,), one for each resample, (R,)."""
    return divide(weight @ values, weight.sum(axis=1))


def correlation(x: np.ndarray, y: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return Pearson correlations of x and y (n,), one for each resample, (R,)."""
    x_mean = mean(x, weight)
    y_mean = mean(y, weight)
    covariance = mean(x * y, weight) - x_mean * y_mean
    x_variance = mean(x * x, weight) - x_mean**2
    y_variance = mean(y * y, weight) - y_mean**2
    return divide(covariance, np.sqrt(x_variance * y_variance))


def divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide, with NaN where the divisor is 0."""
    return np.divide(a, b, out=np.full(len(a), np.nan), where=b != 0)


def figure(values: np.ndarray) -> list[float] | None:
    """Return the value of the sample and its 95 % interval; None if the sample has none."""
    if np.isnan(values[0]):
        return None
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return [round(float(value), 3) for value in (values[0], low, high)]


# ---- Responses
class Reply(NamedTuple):
    """A response of an embedded world."""

    problem: str
    prompt_ids: list[int]
    response_ids: list[int]
    text: str  # a character for each token
    is_sampled: bool = True  # or else it is the world's own solution

    images = ()
    sampled = None


def sample_replies(policy_folder: str, problems_file: str, count: int) -> list[Reply]:
    """Sample a response to each of the first problems of a file."""
    model = find_model(policy_folder, LoadingSettings())
    settings = ProblemSettings(template="none", max_prompt_tokens=64, problem_column="problem")
    problems = load_problems(problems_file, settings, model)[:count]
    requests = []
    for i, problem in enumerate(problems):
        requests.append(rollout.Request(problem.prompt_ids, keyed_seed("signal", i)))
    engine = TorchEngine(model, 256, parallel.DEVICE, torch.float32)
    episodes = engine.generate(requests, rollout.Sampling(1, 1.0, MAX_TOKENS))
    replies = []
    for problem, episode in zip(problems, episodes, strict=True):
        characters = [model.tokenizer.decode([token])[:1] for token in episode.response_ids]
        text = "".join(characters)
        replies.append(Reply(problem.text, problem.prompt_ids, episode.response_ids, text))
    return replies


def kept_replies(file: Path, policy_folder: str, problems_file: str, count: int) -> list[Reply]:
    """Return the responses in a file, which is written if it is not there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        replies = sample_replies(policy_folder, problems_file, count)
        with written_whole(file) as temporary:
            temporary.write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    return [Reply(*json.loads(line)) for line in file.read_text().splitlines()]


def write_replies(policy_folder: str, problems_file: str, first: int, count: int) -> list[Reply]:
    """Return the world's careful solutions of some problems of a file."""
    tokenizer = find_model(policy_folder, LoadingSettings()).tokenizer
    rows = read_rows(problems_file)[first : first + count]
    replies = []
    for row in rows:
        prompt_ids = tokenizer.encode(row["problem"])
        response_ids = tokenizer.encode(row["solution"] + toy.EOS)
        replies.append(Reply(row["problem"], prompt_ids, response_ids, row["solution"], False))
    return replies


class Labels(NamedTuple):
    """What is known of the responses."""

    is_short: np.ndarray  # (n responses,) bool: fewer steps that do something than the problem has
    step_response: np.ndarray  # (n steps,) the response that a step is of
    step_place: np.ndarray  # (n steps,) the token that is its result, counted in its response
    step_is_wrong: np.ndarray  # (n steps,) bool


def label(replies: Sequence[Reply]) -> Labels:
    """Say which responses are short and which sampled steps are wrong."""
    is_short = []
    steps = []
    for i, reply in enumerate(replies):
        steps_of_reply = toy.label_steps(reply.problem, reply.text)
        n_working = sum("+0=" not in reply.text[step.start : step.end] for step in steps_of_reply)
        is_short.append(n_working < reply.problem.count(" "))
        if not reply.is_sampled:
            continue
        for place, is_wrong in judge_results(reply.problem, reply.text):
            steps.append((i, place, is_wrong))
    table = np.array(steps, dtype=int).reshape(-1, 3)
    return Labels(np.array(is_short), table[:, 0], table[:, 1], table[:, 2].astype(bool))


def judge_results(problem: str, text: str) -> list[tuple[int, bool]]:
    """Return the place of each step's result and whether the step is wrong, up to the first wrong.

    Only steps whose whole past is right are judged: what follows a mistake is not wrong by itself.
    """
    judged = []
    for step in toy.label_steps(problem, text):
        place = step.end - 1
        if text[place - 1] != "=":
            break
        judged.append((place, not step.is_right))
        if not step.is_right:
            break
    return judged


# ---- Flows
class Fit(NamedTuple):
    """How a flow is fitted."""

    world: str
    context: str = "previous"
    is_standardised: bool = False
    amount: int = 1

    @property
    def name(self) -> str:
        """The name of its folder."""
        kind = "standardised" if self.is_standardised else "plain"
        return f"{self.world}-{self.context}-{kind}-{self.amount}"


def list_fits(world: str, amounts: Sequence[int]) -> list[Fit]:
    """Return the fits to compare, the default one first."""
    fits = [Fit(world)]
    fits += [Fit(world, context=context) for context in ("next", "self")]
    for amount in amounts:
        fits += [Fit(world, amount=amount), Fit(world, is_standardised=True, amount=amount)]
    return list(dict.fromkeys(fits))


def fit_settings(fit: Fit, folder: Path) -> train_flow.Config:
    """Return the settings of train_flow.py that make a fit."""
    preset = dict(toy.PRESETS["train_flow"][fit.world])
    del preset["epochs"]
    epochs = fit.amount * EPOCHS
    preset["save_every"] = 0
    preset["flow_blocks"] = 2  # as the published figures had
    return change(
        train_flow.Config(),
        **preset,
        model=fit.world,
        contexts=(fit.context,),
        standardise=fit.is_standardised,
        calibrate_at=TIMES,
        epochs=max(1, epochs),
        folder=str(folder),
        compile="off",  # many fits in one process
        dtype="float32",
    )


def kept_flow(fit: Fit, folder: Path) -> fl.Flow:
    """Return the flow of a fit, which is made if it is not there."""
    target = folder / fit.name
    config = fit_settings(fit, target)
    if not (target / "flow").exists():
        if fit.amount:
            train_flow.main(config)
        else:
            write_untrained(config)
    return read_flow(target / "flow")


def read_flow(path: Path) -> fl.Flow:
    """Load a flow of any dimension."""
    _, config = fl.read_native(fl.find_flow(path))
    return fl.load_flow(path, config.dim).to(parallel.DEVICE).eval()


def write_untrained(config: train_flow.Config) -> None:
    """Write a flow that has learnt nothing, with the statistics that an offline start gives it."""
    folder = Path(config.folder)
    config, model = train_flow.resolve(config)
    solutions = load_solutions(config.data, config.solutions, model)
    policy = load_policy(model.path).requires_grad_(False).to(parallel.DEVICE)
    flow_config = fl.FlowConfig(
        dim=model.text_config.hidden_size,
        n_blocks=config.flow.flow_blocks,
        contexts=config.contexts,
        standardised=config.flow.standardise,
        calibrated_at=TIMES,
    )
    torch.manual_seed(config.seed)
    flow = fl.Flow(flow_config)
    parallel.shard(flow, (), torch.float32)
    n_held_out = train_flow.count_held_out(config.flow.held_out, len(solutions), 1)
    measured = solutions[: train_flow.N_MEASURED] + solutions[-n_held_out:]
    latents = train_flow.Latents(policy, flow_config, measured, TOKEN_BUDGET)
    n_measured = len(measured) - n_held_out
    if config.flow.standardise:
        train_flow.measure_latents(flow, latents, range(n_measured))
    train_flow.calibrate(flow, latents, range(n_measured, len(measured)), config.seed)
    weights = parallel.gather_weights(parallel.full_weights(flow, torch.float32))
    (folder / "flow").mkdir(parents=True)
    fl.save_flow(flow_config, weights, folder / "flow")


# ---- Scores
class Scored(NamedTuple):
    """What is known of the M response tokens of all responses, response after response."""

    response: np.ndarray  # (M,) the response that a token is of
    start: np.ndarray  # (n responses,) its first token
    logp: np.ndarray  # (M,)
    entropy: np.ndarray  # (M,)
    errors: np.ndarray  # (draws, times, taps, M) velocity errors; NaN without a context


@torch.no_grad()
def score_responses(
    policy: Policy, flows: Sequence[fl.Flow], rows: Sequence[batching.Row], n_draws: int
) -> list[Scored]:
    """Score the tokens of responses under a policy, for each flow; a flow has one context mode."""
    taps = tap_layers(policy.n_layers, PERCENTILES)
    depths = [tap / policy.n_layers for tap in taps]
    found = {}
    for indices, batch in batching.micro_batches(rows, TOKEN_BUDGET, 0, 1):
        output = policy(batch, taps=taps)
        lengths = batch.response_mask.sum(dim=1).tolist()
        values = [
            output.logp[batch.response_mask].split(lengths),
            output.entropy[batch.response_mask].split(lengths),
        ]
        for flow in flows:
            flow_rows = fl.make_rows(
                flow.config, output.latents, depths, batch.attention_mask, batch.targets
            )
            flow_rows = flow.standardise(flow_rows)
            values.append(draw_errors(flow, flow_rows, indices, lengths, n_draws))
        for place, index in enumerate(indices):
            found[index] = [value[place] for value in values]
    parts = [found[index] for index in range(len(rows))]
    lengths = np.array([len(row.response_ids) for row in rows])
    logp, entropy, *errors = [join(values) for values in zip(*parts, strict=True)]
    response = np.repeat(np.arange(len(rows)), lengths)
    start = lengths.cumsum() - lengths
    return [Scored(response, start, logp, entropy, of_flow) for of_flow in errors]


def join(parts: Sequence[torch.Tensor]) -> np.ndarray:
    """Put values of single responses (…, length) together, (…, M)."""
    return torch.cat(list(parts), dim=-1).cpu().double().numpy()


def draw_errors(
    flow: fl.Flow, rows: fl.FlowRows, indices: Sequence[int], lengths: list[int], n_draws: int
) -> tuple[torch.Tensor, ...]:
    """Return the velocity errors of each response of a batch, (draws, times, taps, length) each."""
    n_taps, _, n_targets = rows.exists.shape
    errors = torch.full((n_draws, len(TIMES), n_taps, n_targets), torch.nan)
    exists = rows.exists[:, 0].cpu()  # (L, M)
    for draw in range(n_draws):
        keys = [("signal", draw, index) for index in indices]
        noise, _ = fl.draw(flow.config, keys, lengths, parallel.DEVICE)
        errors[draw][:, exists] = fl.errors_of_rows(flow, rows, noise, TIMES).cpu()
    return errors.split(lengths, dim=-1)


def response_means(values: np.ndarray, scored: Scored) -> np.ndarray:
    """Average values of tokens (…, M) over each response, (…, n responses).

    NaNs do not count; a response of nothing else has none, e.g. of one token, without a next one.
    """
    is_there = ~np.isnan(values)
    total = np.add.reduceat(np.where(is_there, values, 0), scored.start, axis=-1)
    count = np.add.reduceat(is_there, scored.start, axis=-1, dtype=float)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def excess_of(errors: np.ndarray, flow: fl.Flow) -> np.ndarray:
    """Return velocity errors (times, taps, M) in spreads above the mean of expert tokens."""
    scale = flow.expert_scale(TIMES)
    expert_mean = scale.mean.cpu().double().numpy()[..., None]
    expert_spread = scale.spread.cpu().double().numpy()[..., None]
    return (errors - expert_mean) / expert_spread


# ---- What a set of responses says
class Question(NamedTuple):
    """Labelled responses with resampling weights."""

    labels: Labels
    weight: np.ndarray  # (R, n responses)

    def of_steps(self, values: np.ndarray, scored: Scored) -> list[float] | None:
        """Return the AUC of values of tokens (M,) for wrong steps."""
        weight = self.weight[:, self.labels.step_response]
        return figure(auc(values[self.results(scored)], self.labels.step_is_wrong, weight))

    def results(self, scored: Scored) -> np.ndarray:
        """Return the tokens that are results of judged steps, (n steps,) of M."""
        return scored.start[self.labels.step_response] + self.labels.step_place

    def of_responses(self, values: np.ndarray) -> list[float] | None:
        """Return the AUC of values of responses (n,) for short ones."""
        has_value = ~np.isnan(values)
        weight = self.weight[:, has_value]
        return figure(auc(values[has_value], self.labels.is_short[has_value], weight))

    def mean_of(self, values: np.ndarray, chosen: np.ndarray) -> list[float] | None:
        """Return the mean of values of some responses; chosen is (n,) bool."""
        counts = chosen & ~np.isnan(values)
        return figure(mean(values[counts], self.weight[:, counts]))


def ask(replies: Sequence[Reply]) -> Question:
    """Label responses, each of which is of another problem."""
    return Question(label(replies), resampling_weights(len(replies)))


def describe(question: Question) -> dict:
    """Count what there is to tell apart."""
    labels = question.labels
    return {
        "responses": len(labels.is_short),
        "short": int(labels.is_short.sum()),
        "steps": len(labels.step_is_wrong),
        "wrong": int(labels.step_is_wrong.sum()),
    }


def baselines(question: Question, scored: Scored, replies: Sequence[Reply]) -> dict:
    """Return the AUCs of what needs no flow."""
    lengths = np.array([len(reply.response_ids) for reply in replies], dtype=float)
    surprise = -scored.logp
    return {
        "-log-prob": {
            "steps": question.of_steps(surprise, scored),
            "responses": question.of_responses(response_means(surprise, scored)),
        },
        "entropy": {
            "steps": question.of_steps(scored.entropy, scored),
            "responses": question.of_responses(response_means(scored.entropy, scored)),
        },
        "shortness": {"steps": None, "responses": question.of_responses(-lengths)},
    }


def measure(question: Question, scored: Scored, flow: fl.Flow) -> list[dict]:
    """Return what one draw of noise tells, for each time: by tap, over taps, and the excess."""
    errors = scored.errors[0]  # (times, taps, M)
    excess = excess_of(errors, flow)
    is_short = question.labels.is_short
    rows = []
    for i, time in enumerate(TIMES):
        by_tap = {f"tap {tap + 1}": errors[i, tap] for tap in range(errors.shape[1])}
        scores = {**by_tap, "score": errors[i].mean(axis=0), "excess": excess[i].mean(axis=0)}
        row = {"time": time, "steps": {}, "responses": {}}
        for name, values in scores.items():
            row["steps"][name] = question.of_steps(values, scored)
            row["responses"][name] = question.of_responses(response_means(values, scored))
        of_response = response_means(scores["excess"], scored)
        row["excess short"] = question.mean_of(of_response, is_short)
        row["excess complete"] = question.mean_of(of_response, ~is_short)
        rows.append(row)
    return rows


def measure_draws(question: Question, scored: Scored, counts: Sequence[int]) -> list[dict]:
    """Return the AUCs of the published score, averaged over several draws of noise."""
    score = scored.errors[:, PUBLISHED].mean(axis=1)  # (draws, M)
    rows = []
    for count in counts:
        values = score[:count].mean(axis=0)
        steps = question.of_steps(values, scored)
        responses = question.of_responses(response_means(values, scored))
        rows.append({"draws": count, "steps": steps, "responses": responses})
    return rows


def measure_repeats(question: Question, scored: Scored) -> list[dict]:
    """Return the correlation of two scorings that differ in their noise, for each time.

    Over all tokens most of it is due to the kinds of token; hence also over results of steps alone.
    """
    token_weight = question.weight[:, scored.response]
    is_result = np.zeros(len(scored.response), bool)
    is_result[question.results(scored)] = True
    rows = []
    for i, time in enumerate(TIMES):
        score = scored.errors[:2, i].mean(axis=1)  # (2, M)
        row = {"time": time}
        for name, chosen in (("tokens", np.isfinite(score[0])), ("results", is_result)):
            row[name] = figure(correlation(*score[:, chosen], token_weight[:, chosen]))
        row["responses"] = figure(correlation(*response_means(score, scored), question.weight))
        rows.append(row)
    return rows


# ---- The parts
def measure_world(world: str, settings: Settings, report) -> None:
    """Measure everything about a world; report(part, figures) after each part."""
    folder = Path(settings.folder)
    made = find_world(world)
    if made.habit == "repeating":
        raise ValueError(
            f"{world}: its short work has as many working steps as careful work, which this program "
            "does not tell apart; study/accept.py does"
        )
    file = folder / f"{world}-responses-{settings.n_responses}.jsonl"
    replies = kept_replies(file, made.path("model"), made.path("train.jsonl"), settings.n_responses)
    if made.habit == "idling":  # the base completes next to none
        replies += write_replies(
            made.path("model"), made.path("train.jsonl"), settings.n_responses, settings.n_written
        )
    question = ask(replies)
    policy = load_policy(made.path("model")).float().to(parallel.DEVICE)
    n_written = len(replies) - settings.n_responses
    report("counts", {**describe(question), "written": n_written})
    by_fit = []
    for fit in list_fits(world, settings.amounts):
        flow = kept_flow(fit, folder)
        is_default = fit == Fit(world)
        n_draws = max(2, *settings.draws) if is_default else 1
        (scored,) = score_responses(policy, [flow], replies, n_draws)
        if is_default:
            report("baselines", baselines(question, scored, replies))
            report("draws", measure_draws(question, scored, settings.draws))
            report("repeats", measure_repeats(question, scored))
        times = measure(question, scored, flow)
        by_fit.append({**fit._asdict(), "times": times})
        report("fits", by_fit)
    if settings.rl_steps:
        report("drift", measure_drift(world, settings))


def measure_drift(world: str, settings: Settings) -> list[dict]:
    """Follow the score along a run: with the flow that the run updates, and with the offline one.

    The responses are to problems that the run does not train on.
    """
    folder = Path(settings.folder)
    made = find_world(world)
    offline = folder / Fit(world).name / "flow"
    run = folder / f"{world}-run"
    run_rl(world, settings.rl_steps, offline, run)
    stages = {0: (made.path("model"), offline)}
    for export in sorted((run / "exports").iterdir(), key=lambda path: int(path.name[5:])):
        stages[int(export.name[5:])] = (str(export / "policy"), export / "flow")
    rows = []
    for step, (policy_folder, online) in stages.items():
        file = folder / f"{world}-step-{step}-responses-{settings.rl_responses}.jsonl"
        problems = made.path("expert.jsonl")
        replies = kept_replies(file, policy_folder, problems, settings.rl_responses)
        question = ask(replies)
        policy = load_policy(policy_folder).float().to(parallel.DEVICE)
        flows = [read_flow(offline), read_flow(online)]
        scores = score_responses(policy, flows, replies, 1)
        for kind, flow, scored in zip(("offline", "updated"), flows, scores, strict=True):
            row = measure(question, scored, flow)[PUBLISHED]
            rows.append({"step": step, "flow": kind, "counts": describe(question), **row})
    return rows


def run_rl(world: str, n_steps: int, flow: Path, folder: Path) -> None:
    """Train with the published flow reward and online update, with three exports on the way."""
    if (folder / "policy").exists():
        return
    config = change(
        train_rl.Config(),
        **{
            **toy.PRESETS["train_rl"][world],
            "model": world,
            "flow": str(flow),
            "steps": n_steps,
            "export_every": max(1, n_steps // 3),
            "save_every": 0,
            "eval_data": (),
            "engine": "torch",
            "folder": str(folder),
        },
    )
    train_rl.main(config)


# ---- Tables
def tables(path: str | Path) -> str:
    """Return the tables of a file of figures as Markdown; also of study/text_signal.py's."""
    result = read_json(path, "what was measured of scores")
    if "text" in result:
        return text_tables(result["text"])
    need_keys([result], Path(path), ["worlds"])
    parts = []
    for world, found in result["worlds"].items():
        if found:  # it may not have been measured yet
            parts.append(world_tables(world, found))
    return "\n\n".join(parts)


def world_tables(world: str, found: dict) -> str:
    """Return the tables of a world."""
    counts = found["counts"]
    n_sampled = counts["responses"] - counts["written"]
    title = (
        f"**{world}**: {n_sampled} responses of the base policy, {counts['short']} of them short; "
        f"{counts['steps']} judged steps, {counts['wrong']} of them wrong."
    )
    if counts["written"]:
        title += f" {counts['written']} solutions of the world count as complete responses."
    parts = [title]
    renderers = {
        "baselines": baseline_table,
        "fits": fit_tables,
        "draws": draw_table,
        "repeats": repeat_table,
        "drift": drift_table,
    }
    for name, render in renderers.items():
        if name in found:
            parts.append(render(found[name]))
    return "\n\n".join(parts)


def markdown(title: str, header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Return a table with a title; lists are figures with their intervals."""
    lines = [title, "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        lines.append("| " + " | ".join(cell(value) for value in row) + " |")
    return "\n".join(lines)


def cell(value, n_digits: int = 2) -> str:
    """Return a value as text: a figure with its interval, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, list):
        middle, low, high = [f"{number:.{n_digits}f}" for number in value]
        return f"{middle} ({low} – {high})"
    return str(value)


def baseline_table(rows: dict) -> str:
    """Show what needs no flow."""
    cells = [(name, row["steps"], row["responses"]) for name, row in rows.items()]
    header = ("without a flow", "AUC, wrong steps", "AUC, short responses")
    return markdown("What needs no flow:", header, cells)


def fit_tables(fits: list[dict]) -> str:
    """Show the fits at the published time, and the default one by time and tap."""
    rows = []
    places = list(fl.CONTEXTS)
    for fit in sorted(
        fits,
        key=lambda fit: (places.index(fit["context"]), fit["is_standardised"], fit["amount"]),
    ):
        found = fit["times"][PUBLISHED]
        kind = "standardised" if fit["is_standardised"] else "as published"
        amount = "untrained" if fit["amount"] == 0 else f"{fit['amount']} ×"
        rows.append(
            (
                fit["context"],
                kind,
                amount,
                found["steps"]["score"],
                found["responses"]["score"],
                found["responses"]["excess"],
                found["excess short"],
                found["excess complete"],
            )
        )
    header = (
        "context",
        "latents",
        f"offline start, × {EPOCHS} epochs",
        "AUC, wrong steps",
        "AUC, short responses",
        "by the excess",
        "excess of short ones",
        "of complete ones",
    )
    parts = [markdown(f"Score at t = {TIMES[PUBLISHED]}:", header, rows)]
    longest = max(fits, key=lambda fit: (fit["context"] == "previous", fit["amount"]))
    for fit in {fits[0]["amount"]: fits[0], longest["amount"]: longest}.values():
        parts.append(tap_table(fit))
    return "\n\n".join(parts)


def tap_table(fit: dict) -> str:
    """Show a fit by time and tap."""
    rows = []
    for kind, title in (("steps", "wrong steps"), ("responses", "short responses")):
        for found in fit["times"]:
            rows.append((title, found["time"], *found[kind].values()))
    header = ("AUC for", "t", *fit["times"][0]["steps"])
    kind = "standardised latents" if fit["is_standardised"] else "latents as published"
    title = f"By time and tap, {fit['amount']} × {EPOCHS} epochs, {kind}:"
    return markdown(title, header, rows)


def draw_table(rows: list[dict]) -> str:
    """Show what more draws of noise bring."""
    cells = [(row["draws"], row["steps"], row["responses"]) for row in rows]
    header = ("draws of noise", "AUC, wrong steps", "AUC, short responses")
    return markdown(f"Averaged over draws of noise, 1 × {EPOCHS} epochs:", header, cells)


def repeat_table(rows: list[dict]) -> str:
    """Show how two scorings agree."""
    cells = []
    for row in rows:
        kinds = [cell(row[name], n_digits=3) for name in ("tokens", "results", "responses")]
        cells.append((row["time"], *kinds))
    header = ("t", "all tokens", "results of steps", "responses")
    title = f"Correlation of two scorings with different noise, 1 × {EPOCHS} epochs:"
    return markdown(title, header, cells)


def drift_table(rows: list[dict]) -> str:
    """Show the score along a run."""
    cells = []
    for row in rows:
        counts = row["counts"]
        cells.append(
            (
                row["step"],
                row["flow"],
                f"{counts['short']} of {counts['responses']}",
                f"{counts['wrong']} of {counts['steps']}",
                row["steps"]["score"],
                row["responses"]["score"],
                row["excess short"],
                row["excess complete"],
            )
        )
    header = (
        "RL steps",
        "flow",
        "short",
        "wrong steps",
        "AUC, wrong steps",
        "AUC, short responses",
        "excess of short ones",
        "of complete ones",
    )
    return markdown("Along a run with the published flow reward:", header, cells)


def text_tables(found: dict) -> str:
    """Return the tables of study/text_signal.py."""
    columns = ("place", "place in pairs", "others", "responses in pairs")
    rows = []
    for row in found["rows"]:
        rows.append((row["score"], row["latents"], row["steps"], *(row[name] for name in columns)))
    header = (
        "score",
        "latents",
        "steps of the offline start",
        "AUC, changed number against the same place unchanged",
        "the same in pairs: share that scores higher",
        "AUC, changed number against all other tokens",
        "share of pairs whose changed solution scores higher",
    )
    title = (
        f"**{found['model']}**: {found['pairs']} held-out solutions and the same with one result "
        "changed. Chance is 0.5 throughout."
    )
    return markdown(title, header, rows)


# ---- Main
def main(settings: Settings) -> None:
    """Measure what was asked for, write the figures as they come, and print the tables."""
    if settings.render is not None:
        print(tables(settings.render))
        return
    parallel.start()
    unknown = [world for world in settings.worlds if world not in toy.WORLDS]
    if unknown:
        raise ValueError(f"worlds {unknown}: expected some of {', '.join(toy.WORLDS)}")
    file = Path(settings.json or Path(settings.folder) / "signal.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    found = {world: {} for world in settings.worlds}
    result = {"machine": machine(), "settings": asdict(settings), "worlds": found}
    for world in settings.worlds:

        def report(part: str, figures, world=world) -> None:
            found[world][part] = figures
            file.write_text(json.dumps(result) + "\n")

        measure_world(world, settings, report)
    print(tables(file))


if __name__ == "__main__":
    run(lambda: main(tyro.cli(Settings)))
