"""Checks of exercise 3: small rows by hand, then a response of a recorded step."""

from collections.abc import Iterator
from types import ModuleType

import torch

import rlfr
from course.exercises import picture
from course.exercises.cases import Case, Mistake

REWARD = torch.tensor([[0.0, -1.0, 0.0, -2.0, 0.0]])
ALL = torch.ones(1, 5, dtype=torch.bool)
LEVELS = " .:-=+*#%@"


def undiscounted_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question to gamma 1."""
    yield Case(
        "gamma 1: rewards 0, -1, 0, -2, 0",
        lambda: student.token_returns(REWARD, ALL, 1.0),
        torch.tensor([[-3.0, -3.0, -2.0, -2.0, 0.0]]),
        [
            Mistake(
                REWARD.cumsum(dim=1),
                "the sum went over the tokens before; a token is responsible for those after it: "
                "flip, cumsum, flip, or a loop from the end",
            ),
            Mistake(
                torch.tensor([[-3.0, -2.0, -2.0, 0.0, 0.0]]),
                "the sum begins with the token's own reward: j >= k",
            ),
            Mistake(
                torch.full((1, 5), -3.0),
                "each token has a sum of its own, of the rewards from it on",
            ),
        ],
    )


def discounted_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to gamma 0.5 and 0."""
    yield Case(
        "gamma 0.5: the same rewards",
        lambda: student.token_returns(REWARD, ALL, 0.5),
        torch.tensor([[-0.75, -1.5, -1.0, -2.0, 0.0]]),
        [
            Mistake(torch.tensor([[-3.0, -3.0, -2.0, -2.0, 0.0]]), "gamma was not used"),
            Mistake(
                torch.tensor([[-0.75, -0.75, -0.25, -0.25, 0.0]]),
                "the exponent is j - k, the distance from the token that pays, not j, the place in "
                "the response",
            ),
            Mistake(
                torch.tensor([[-0.375, -0.75, -0.5, -1.0, 0.0]]),
                "the token's own reward is not discounted: gamma^0 = 1",
            ),
        ],
    )
    yield Case(
        "gamma 0: each token pays for itself",
        lambda: student.token_returns(REWARD, ALL, 0.0),
        REWARD,
        [Mistake(torch.full((1, 5), torch.nan), "0/0: do not divide by powers of gamma")],
    )


def gamma_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to some gammas."""
    yield from undiscounted_cases(student)
    yield from discounted_cases(student)


def tool_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question of a response with tokens of a tool."""
    tool = torch.tensor([[True, True, False, False, True]])
    reward = torch.tensor([[0.0, 0.0, -9.0, 0.0, -4.0]])
    yield Case(
        "gamma 0.5: own, own, tool, tool, own; rewards 0, 0, -9, 0, -4",
        lambda: student.token_returns(reward, tool, 0.5),
        torch.tensor([[-1.0, -2.0, 0.0, 0.0, -4.0]]),
        [
            Mistake(
                torch.tensor([[-0.25, -0.5, 0.0, 0.0, -4.0]]),
                "the tool's tokens discounted: the return walks past them unchanged, see "
                "torch.where(mask[:, k], …, following)",
            ),
            Mistake(
                torch.tensor([[-2.5, -5.0, 0.0, 0.0, -4.0]]),
                "what stands at a tool's token is no reward of the policy's: mask the rewards",
            ),
            Mistake(
                torch.tensor([[-1.0, -2.0, -4.0, -4.0, -4.0]]),
                "a tool's token has no return: multiply by the mask at the end",
            ),
        ],
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from gamma_cases(student)
    yield from tool_cases(student)
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(10, 20, generator=generator)
    mask = torch.rand(10, 20, generator=generator) < 0.7
    yield Case(
        "ten random responses, gamma 0.9",
        lambda: student.token_returns(rewards, mask, 0.9),
        rlfr.token_returns(rewards, mask, 0.9),
    )


def show(student: ModuleType) -> None:
    """Draw the returns of a recorded response for some gammas."""
    episode = picture.two_responses()[0]
    reward = torch.tensor([episode["dense_reward"]])  # (1, T)
    mask = torch.ones_like(reward, dtype=torch.bool)
    most = -reward.sum().item()
    print(f"Who pays for penalties of {most:.3f} in all; @ is all of them, a blank nothing:\n")
    for gamma in (1.0, 0.9, 0.5, 0.0):
        share = -student.token_returns(reward, mask, gamma)[0] / most
        signs = [LEVELS[round(9 * value)] for value in share.clamp(0, 1).tolist()]
        print(f"gamma {gamma:g}\n{picture.below(episode['tokens'], signs)}")
