"""Checks of exercise 10: the answers are found anew in what is recorded."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cache
from types import ModuleType

from course.exercises import picture
from course.exercises.cases import Case, Mistake
from worlds import toy


# ---- What is right, from the record
@cache
def step_of_fall() -> int:
    """Return the step whose share of right answers is least beside that of the step before."""
    lines = (picture.RUN / "metrics.jsonl").read_text().splitlines()
    rewards = {row["step"]: row["reward"] for row in map(json.loads, lines)}
    return min(list(rewards)[1:], key=lambda step: rewards[step] - rewards[step - 1])


@cache
def failed() -> list[dict]:
    """Return the responses to the problem of that step that nobody has solved."""
    groups = defaultdict(list)
    for episode in picture.stored(step_of_fall()):
        groups[episode["question"]].append(episode)
    (found,) = [group for group in groups.values() if not any(one["correct"] for one in group)]
    return found


def first_wrong(episode: dict) -> toy.Step | None:
    """Return the first wrong step of a response."""
    steps = toy.label_steps(episode["question"], episode["response"])
    return next((step for step in steps if not step.is_right), None)


def text_of(episode: dict, step: toy.Step) -> str:
    """Return a step of a response as it is written."""
    return episode["response"][step.start : step.end]


@cache
def wrong_step() -> tuple[str, list[dict]]:
    """Return the first wrong step that most failed responses write, and these responses."""
    by_text = defaultdict(list)
    for episode in failed():
        step = first_wrong(episode)
        if step:
            by_text[text_of(episode, step)].append(episode)
    return max(by_text.items(), key=lambda item: len(item[1]))


def mistake_of(written: str) -> str:
    """Return what is wrong with a step such as 3+4=7 of a response that is wrong there."""
    value, sign, operand, _, result = written
    is_calculated = toy.calculate(int(value), sign, int(operand)) == int(result)
    return "operation" if is_calculated else "calculation"


def share_of(token: str) -> float:
    """Return the share of the step's recorded flow reward that falls on a token."""
    sums: Counter = Counter()
    for episode in picture.stored(step_of_fall()):
        for text, reward in zip(episode["tokens"], episode["dense_reward"], strict=True):
            sums[text] += reward
    return sums[token] / sums.total()


def wrong_place(episode: dict) -> int:
    """Return the token at which a response goes wrong: the sign of a step, or its result."""
    step = first_wrong(episode)
    written = text_of(episode, step)
    offset = 1 if mistake_of(written) == "operation" else len(written) - 1
    return step.start + offset


def verdict() -> str:
    """Return where the flow reward penalises the responses that write the wrong step."""
    at_wrong = at_right = 0
    for episode in wrong_step()[1]:
        place = wrong_place(episode)
        for k, reward in enumerate(episode["dense_reward"]):
            at_wrong += reward < 0 and k == place
            at_right += reward < 0 and k != place
    if not at_wrong:
        return "never at the wrong token"
    return "at the wrong token and at right ones" if at_right else "at the wrong token alone"


# ---- Questions
def step_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions where it fell."""
    step = step_of_fall()
    yield Case(
        "STEP, at which the share of right answers falls most",
        lambda: student.STEP,
        step,
        [
            Mistake(step - 1, "this is the last step before the fall"),
            Mistake(1, "the first step has the least, but nothing has fallen yet"),
        ],
        expects="another step: that with the largest difference from the step before",
    )
    (first, *_) = failed()
    yield Case(
        f"PROBLEM of step {step} that no recorded response solves",
        lambda: student.PROBLEM,
        first["question"],
        expects="another problem of that step, whose eight responses are all wrong",
    )


def cause_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions why it fell."""
    (first, *_) = failed()
    written, _ = wrong_step()
    last = toy.label_steps(first["question"], first["response"])[-1]
    yield Case(
        "WRITTEN, the first wrong step of most responses to it",
        lambda: student.WRITTEN,
        written,
        [
            Mistake(
                text_of(first, last),
                "this is their last step; it follows from what went wrong before. Calculate along",
            ),
        ],
        expects="another step; calculate the problem along with the response",
    )
    yield Case(
        f"MISTAKE in {written}",
        lambda: student.MISTAKE,
        mistake_of(written),
        [
            Mistake("calculation", "modulo 10 the result is right; compare with the problem"),
            Mistake("operation", "the problem asks for this; calculate it, modulo 10"),
        ],
        expects='another of "calculation" and "operation"',
    )


def reward_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions what outcome and flow reward say of it."""
    (first, *_) = failed()
    yield Case(
        "OUTCOME, the outcome advantage of the responses to this problem",
        lambda: student.OUTCOME,
        0.0,
        [
            Mistake(
                first["advantage"][0],
                "this is the advantage of their first token, in which the flow reward is; how do "
                "eight equal outcomes compare?",
            ),
        ],
        expects="another number; how do eight equal outcomes compare?",
    )
    yield Case(
        "SHARE of the step's flow reward that falls on =",
        lambda: student.SHARE,
        share_of("="),
        expects="another number; sum the flow reward of all = and of all tokens, or read the page",
        tolerance=0.02,
    )
    yield Case(
        "VERDICT, where the flow reward penalises these responses",
        lambda: student.VERDICT,
        verdict(),
        expects='another of "never at the wrong token", "at the wrong token alone" and "at the wrong '
        'token and at right ones"',
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from step_cases(student)
    yield from cause_cases(student)
    yield from reward_cases(student)


def show(student: ModuleType) -> None:
    """Show the failed responses with their penalties."""
    written, episodes = wrong_step()
    print(
        f"{len(failed())} responses to {failed()[0]['question']} of step {step_of_fall()}; ^ is a penalty:\n"
    )
    for episode in failed()[:4]:
        signs = ["^" if reward < 0 else " " for reward in episode["dense_reward"]]
        print(picture.below(episode["tokens"], signs))
    hits = sum(episode["dense_reward"][wrong_place(episode)] < 0 for episode in episodes)
    penalties = [sum(reward < 0 for reward in episode["dense_reward"]) for episode in episodes]
    print(
        f"\n{len(episodes)} of them write {written}. The wrong token is penalised in {hits} of these;",
        end="",
    )
    print(f" {min(penalties)} to {max(penalties)} tokens are in all.")
    print(f"{share_of('='):.0%} of the step's flow reward falls on =.")
