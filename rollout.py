"""Problems in, episodes out: what an engine takes and gives, and how all ranks sample and grade.

infra/data.py reads the problems; the engines are in engines/.

Tokens are never rewritten: a response that ran out of room keeps its last token and says "length".
(The official code writes EOS over that token, and the response can then score as finished.)
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import rlfr
from infra import vision
from infra.batching import keyed_seed, passes
from infra.data import Problem
from infra.models import StopTokens
from infra.parallel import gather_objects, sum_over_ranks
from infra.ranges import BatchSize, NonNegativeInt, OpenFraction, PositiveInt, Temperature
from rewards import Grader, Verdict


@dataclass(frozen=True)
class EngineSettings:
    """What samples responses."""

    # vllm, torch, or a Python file with make_engine(), see docs/turns.md; auto: vLLM on a GPU where
    # it is installed, else torch
    engine: str = "auto"
    # Responses sampled at a time by an engine, which bounds its KV cache; by default 256, or what
    # vLLM takes on a large GPU, 1024
    max_sequences: BatchSize | None = None
    # Largest share of a GPU's free memory for vLLM's KV cache; its weights need some of the rest
    cache_share: OpenFraction = 0.5
    tensor_parallel: PositiveInt = 1  # Ranks that share a vLLM engine
    # What ends a response: also the ends of turns of known templates, or the model's EOS alone
    stop_tokens: StopTokens = "turn-ends"


# ---- Episodes, and what samples them
class Request(NamedTuple):
    """A prompt to sample from."""

    prompt_ids: list[int]
    seed: int  # of its first response; response i has seed + i
    images: tuple[vision.Image, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How to sample."""

    n: int = 1  # responses a prompt
    temperature: float = 1.0  # 0 is greedy; log-probs are then those at temperature 1
    max_tokens: int = 1024  # response tokens, EOS included
    top_p: float = 1.0
    # prompt and response tokens together: a long prompt shortens its own responses, no others
    max_length: int | None = None

    def room(self, request: Request) -> int:
        """Return how many tokens a response to a request may have."""
        if self.max_length is None:
            return self.max_tokens
        return min(self.max_tokens, self.max_length - len(request.prompt_ids))


@dataclass
class Episode:
    """One sampled response."""

    prompt_ids: list[int]
    response_ids: list[int]  # with EOS if it came
    # the sampler's log-prob of each token, at the temperature; of one that was not sampled: anything
    logp: Sequence[float]
    finish_reason: Literal["stop", "length"]
    text: str  # the response without special tokens
    images: tuple[vision.Image, ...] = ()  # of the prompt
    problem: Problem | None = None  # what the prompt asks, where that is known
    verdict: Verdict | None = None  # on the response, once it is graded
    # which response tokens the policy sampled: not those of a tool's result; None: all
    sampled: list[bool] | None = None


def stand_in(problem: Problem, response_ids: list[int], text: str = "") -> Episode:
    """Return an episode that nobody has sampled, of a right response."""
    return Episode(
        prompt_ids=problem.prompt_ids,
        response_ids=response_ids,
        logp=[0.0] * len(response_ids),
        finish_reason="stop",
        text=text,
        images=problem.images,
        problem=problem,
        verdict=Verdict(1.0, correct=True, parts={}, extracted=None, kind="right"),
    )


class Capacity(NamedTuple):
    """What an engine must be able to take."""

    max_length: int  # prompt + response, in tokens
    max_images: int = 0  # of a prompt


def most_images(problems: Iterable[Problem]) -> int:
    """Return the largest number of images of a problem, but 1 at least.

    vLLM does not load the vision tower of a model whose prompts have none.
    """
    return max([1, *(len(problem.images) for problem in problems)])


class Engine(Protocol):
    """Samples with the policy's weights."""

    n_ranks: int  # ranks that share the engine
    tokenizer: PreTrainedTokenizerBase
    held_memory: int  # bytes that torch counts as the engine's tensors even while it sleeps

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Episode]:
        """Return n consecutive episodes for each request."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Wake up and take all weights, by their names in the state dict."""

    def sleep(self) -> None:
        """Free the accelerator; the weights are lost."""


def generate_on_all_ranks(
    engine: Engine,
    requests: Sequence[Request],
    sampling: Sampling,
    expected_tokens: Sequence[float],
) -> list[Episode]:
    """Share requests out to the ranks' engines; return all episodes, in order, on every rank.

    expected_tokens holds the work that each request is likely to be, to balance the shares.
    """
    n_engines = dist.get_world_size() // engine.n_ranks
    shares = balanced_shares(expected_tokens, n_engines)
    my_share = shares[dist.get_rank() // engine.n_ranks]
    episodes = engine.generate([requests[i] for i in my_share], sampling)
    for (
        episode
    ) in episodes:  # every rank reads all: an array is read as one piece, not by the token
        episode.logp = array("f", episode.logp)
    gathered = gather_objects(episodes)
    by_request: dict[int, list[Episode]] = {}
    for share, sampled in zip(shares, gathered[:: engine.n_ranks], strict=True):
        by_request.update(zip(share, in_groups(sampled, sampling.n), strict=True))
    ordered = []
    for i, request in enumerate(requests):
        for episode in by_request[i]:
            # every rank has the images: they did not travel with the episodes
            ordered.append(replace(episode, images=request.images))
    return ordered


def in_groups(items: list, size: int) -> list[list]:
    """Cut a list into consecutive groups of one size."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def balanced_shares(work: Sequence[float], n_shares: int) -> list[list[int]]:
    """Share out indices, the largest work first, each to the share with the least work so far."""
    shares: list[list[int]] = [[] for _ in range(n_shares)]
    load = [0.0] * n_shares
    for i in sorted(range(len(work)), key=lambda i: -work[i]):
        lightest = load.index(min(load))
        shares[lightest].append(i)
        load[lightest] += work[i]
    return shares


def grade_on_all_ranks(
    grader: Grader, problems: Sequence[Problem], episodes: Sequence[Episode]
) -> list[Verdict]:
    """Have every rank grade a share; return all verdicts, in the order of the episodes.

    Episodes are the same number in a row for each problem. All ranks must call this together.
    """
    group_size = len(episodes) // len(problems)
    share = math.ceil(len(problems) / dist.get_world_size())
    start = dist.get_rank() * share
    my_episodes = episodes[start * group_size : (start + share) * group_size]
    verdicts = grader.grade_all(problems[start : start + share], my_episodes)
    return list(chain(*gather_objects(verdicts)))


# ---- The phases of a step: problems in, graded episodes out
@dataclass(frozen=True)
class SamplingSettings:
    """How many episodes a step has, and how they are sampled."""

    prompts: BatchSize = 128  # N, prompts a step
    group_size: BatchSize = 8  # G, samples a prompt
    max_tokens: PositiveInt | None = None  # Longest response; by default 1024, for VL-7B 3072
    temperature: Temperature = 1.0  # Sampling temperature
    # Rounds of dynamic sampling (DAPO), 0: none. It drops groups of equal reward and samples others
    # in their place; after so many rounds dropped groups fill what is missing
    dynamic_sampling: NonNegativeInt = 0


def stand_ins(
    problems: Sequence[Problem],
    settings: SamplingSettings,
    tokenizer: PreTrainedTokenizerBase,
    grader: Grader,
) -> list[Episode]:
    """Return groups of graded stand-ins, one a rank: beginnings of problems, some with the answer."""
    chosen = [problems[i % len(problems)] for i in range(dist.get_world_size())]
    episodes = []
    for problem in chosen:
        answer = problem.answer if isinstance(problem.answer, str) else problem.answer[0]
        for i in range(settings.group_size):
            box = f"\\boxed{{{answer}}}" if i % 2 else ""
            text = box + problem.text[: 8 * i + 8]
            ids = tokenizer(text, add_special_tokens=False)["input_ids"][: settings.max_tokens - 1]
            text = tokenizer.decode(ids, skip_special_tokens=True)
            episodes.append(stand_in(problem, [*ids, tokenizer.eos_token_id or 0], text))
    verdicts = grade_on_all_ranks(grader, chosen, episodes)
    for episode, verdict in zip(episodes, verdicts, strict=True):
        episode.verdict = verdict
    return episodes


@dataclass
class Sampler:
    """What samples groups of responses and grades them."""

    engine: Engine
    grader: Grader
    problems: list[Problem]
    # (n_problems,) mean response tokens when last sampled, 0 before; kept up to date
    lengths: Tensor
    settings: SamplingSettings
    seed: int

    def roll_out(self, cursor: int) -> tuple[list[Episode], int]:
        """Sample G responses for each of N problems from the cursor on.

        Returns the episodes, G in a row for each problem, and the cursor after the last problem.
        """
        self.grader.counts.clear()
        n_problems = self.settings.prompts
        if self.settings.dynamic_sampling:
            return self.roll_out_varied(cursor)
        return self.sample_groups(cursor, n_problems), cursor + n_problems

    def roll_out_varied(self, cursor: int) -> tuple[list[Episode], int]:
        """Roll out and verify until the rewards of every group differ: dynamic sampling."""
        group_size = self.settings.group_size
        wanted = self.settings.prompts * group_size
        kept: list[Episode] = []
        dropped: list[Episode] = []
        for _ in range(self.settings.dynamic_sampling):
            n_missing = (wanted - len(kept)) // group_size
            episodes = self.sample_groups(cursor, n_missing)
            cursor += n_missing
            self.verify(episodes)
            reward = torch.tensor([episode.verdict.reward for episode in episodes])
            is_varied = rlfr.varied_groups(reward, group_size)
            for varied, group in zip(is_varied, in_groups(episodes, group_size), strict=True):
                if varied:
                    kept += group
                else:
                    dropped += group
            if len(kept) == wanted:
                break
        return (kept + dropped)[:wanted], cursor

    def sample_groups(self, cursor: int, n_problems: int) -> list[Episode]:
        """Sample a group for each of n_problems from the cursor on."""
        settings = self.settings
        order = passes(len(self.problems), cursor, n_problems, "problem order", self.seed)
        chosen = [self.problems[index] for _, index in order]
        requests = []
        for (epoch, index), problem in zip(order, chosen, strict=True):
            seed = keyed_seed("roll out", self.seed, epoch, index)
            requests.append(Request(problem.prompt_ids, seed, problem.images))
        indices = [index for _, index in order]
        sampling = Sampling(settings.group_size, settings.temperature, settings.max_tokens)
        expected_tokens = self.expected_tokens(indices)
        episodes = generate_on_all_ranks(self.engine, requests, sampling, expected_tokens)
        groups = in_groups(episodes, settings.group_size)
        for index, problem, group in zip(indices, chosen, groups, strict=True):
            n_tokens = [len(episode.response_ids) for episode in group]
            self.lengths[index] = sum(n_tokens) / len(n_tokens)
            for episode in group:
                episode.problem = problem
        return episodes

    def expected_tokens(self, indices: Sequence[int]) -> list[float]:
        """Return the tokens that problems with these indices are likely to need."""
        known = self.lengths[self.lengths > 0]
        usual_length = known.mean().item() if len(known) else float(self.settings.max_tokens)
        expected = []
        for index in indices:
            length = self.lengths[index].item() or usual_length
            n_prompt = len(self.problems[index].prompt_ids)
            expected.append(n_prompt + self.settings.group_size * length)
        return expected

    def verify(self, episodes: Sequence[Episode]) -> None:
        """Grade the episodes that have no verdict yet, groups that follow one another."""
        ungraded = [episode for episode in episodes if episode.verdict is None]
        problems = [episode.problem for episode in ungraded[:: self.settings.group_size]]
        if not ungraded:
            return
        verdicts = grade_on_all_ranks(self.grader, problems, ungraded)
        for episode, verdict in zip(ungraded, verdicts, strict=True):
            episode.verdict = verdict

    def metrics(self) -> dict[str, float]:
        """Return how often grading went wrong in this step, over all ranks."""
        metrics = {}
        for trouble in ("timeout", "crashed", "capped"):
            count = torch.tensor(float(self.grader.counts[trouble]))
            metrics[f"grader/{trouble}"] = sum_over_ranks(count).item()
        return metrics
