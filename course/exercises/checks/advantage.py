"""Checks of exercise 4: two groups by hand, then groups of problems from hard to easy."""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

import rlfr
from course.exercises.cases import Case, Mistake

REWARD = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
ONE_BEHIND_THE_OTHER = (
    "the G episodes of a group stand one behind the other: view(-1, group_size), where the second size "
    "is G; view(group_size, -1) makes groups of another size"
)


def scaled(groups: Tensor, dim: int, correction: int = 1) -> Tensor:
    """Return groups less their mean along a dimension, in their spreads."""
    spread = groups.std(dim=dim, keepdim=True, correction=correction)
    return (groups - groups.mean(dim=dim, keepdim=True)) / (spread + 1e-9)


def varied_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question of groups whose rewards differ."""
    groups = REWARD.view(2, 4)
    yield Case(
        "rewards 1 0 0 0 and 1 1 0 1, G = 4",
        lambda: student.outcome_advantage(REWARD, 4),
        torch.tensor([1.5, -0.5, -0.5, -0.5, 0.5, 0.5, -1.5, 0.5]),
        [
            Mistake(
                scaled(REWARD, 0),
                "mean and std are those of each group, not of the whole batch, or an easy problem "
                "teaches to be easy: view(-1, group_size), then dim=1",
            ),
            Mistake(
                scaled(groups, 0).flatten(),
                "the comparison went across the groups: dim=1 runs inside a group",
            ),
            Mistake(scaled(REWARD.view(4, 2), 0).flatten(), ONE_BEHIND_THE_OTHER),
            Mistake(scaled(REWARD.view(4, 2), 1).flatten(), ONE_BEHIND_THE_OTHER),
            Mistake(
                scaled(groups, 1, correction=0).flatten(),
                "std divides by G - 1, as torch does unless told otherwise",
            ),
            Mistake(
                (groups - groups.mean(dim=1, keepdim=True)).flatten(),
                "divide by the group's std",
            ),
            Mistake(
                scaled(groups, 1), "return one number for each episode, (B,): flatten() at the end"
            ),
        ],
    )


def equal_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question of a group of equal rewards."""
    equal = torch.full((8,), 0.7)
    centred = equal - equal.mean()
    yield Case(
        "eight rewards of 0.7, G = 8",
        lambda: student.outcome_advantage(equal, 8),
        torch.zeros(8),
        [
            Mistake(
                centred / (equal.std() + 1e-9),
                "the mean of eight times 0.7 is not quite 0.7 in float32, and neither is the std 0: "
                "their ratio is a rounding error as large as a real advantage. Ask whether the "
                "largest reward of the group is above the least",
            ),
            Mistake(torch.full((8,), torch.nan), "0/0 is NaN: equal rewards have advantage 0"),
        ],
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from varied_cases(student)
    yield from equal_cases(student)
    random = torch.rand(24, generator=torch.Generator().manual_seed(0))
    yield Case(
        "24 random rewards, G = 6",
        lambda: student.outcome_advantage(random, 6),
        rlfr.outcome_advantage(random, 6, "grpo"),
    )


def show(student: ModuleType) -> None:
    """Sample groups for problems that are solved with some probability, and count what teaches."""
    n_groups, group_size = 4000, 8
    print(f"Groups of {group_size} answers to problems that are solved with probability p:\n")
    print("    p   groups that teach   a right answer gets   a wrong one gets")
    generator = torch.Generator().manual_seed(0)
    for p in (0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99):
        reward = (torch.rand(n_groups * group_size, generator=generator) < p).float()
        advantage = student.outcome_advantage(reward, group_size)
        teaches = advantage.view(n_groups, group_size).any(dim=1)
        counted = advantage != 0
        right = advantage[counted & (reward == 1)].mean()
        wrong = advantage[counted & (reward == 0)].mean()
        print(f"{p:5.2f}   {teaches.float().mean():17.0%}   {right:19.2f}   {wrong:16.2f}")
