"""Checks of exercise 5: ratios by hand, then a small policy that is updated with and without a clip."""

from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

import rlfr
from course.exercises.cases import Case, Mistake

RATIO = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.0]])
ADVANTAGE = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0]])
CLIP = (0.2, 0.28)
NO_CLIP = (1.0, 1e9)
CLIPPED = RATIO.clamp(0.8, 1.28)


def loss_at(student: ModuleType, ratio: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor]:
    """Return the student's loss at ratios, and where its clip binds."""
    return student.ppo_loss(ratio.log(), torch.zeros_like(ratio), advantage, CLIP)


def value_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question what the loss is."""
    yield Case(
        "the loss at ratios 1.5 and 0.5 with A = 1, the same with A = -1, and 1 with A = 2; "
        "clip (0.2, 0.28)",
        lambda: loss_at(student, RATIO, ADVANTAGE)[0],
        torch.tensor([[-1.28, -0.5, 1.5, 0.8, -2.0]]),
        [
            Mistake(
                torch.minimum(RATIO * ADVANTAGE, CLIPPED * ADVANTAGE),
                "a loss is minimised, and the advantage is to be made larger: mind the sign",
            ),
            Mistake(
                -torch.maximum(RATIO * ADVANTAGE, CLIPPED * ADVANTAGE),
                "the minimum of the two, before the sign is turned: with the maximum the clip stops "
                "the tokens that moved the wrong way",
            ),
            Mistake(
                -CLIPPED * ADVANTAGE,
                "the clip alone also stops tokens that have moved the wrong way: take the minimum "
                "with the ratio that is not clipped",
            ),
            Mistake(
                -torch.minimum(ADVANTAGE / RATIO, (1 / RATIO).clamp(0.8, 1.28) * ADVANTAGE),
                "rho is now over then: exp(logp - old_logp)",
            ),
            Mistake(
                -torch.minimum(RATIO * ADVANTAGE, RATIO.clamp(0.72, 1.2) * ADVANTAGE),
                "clip is (low, high): from 1 - clip[0] to 1 + clip[1]",
            ),
            Mistake(
                -RATIO.log() * ADVANTAGE,
                "rho is a ratio of probabilities, the exp of the difference of the log-probs",
            ),
        ],
    )


def clip_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions where the clip binds, and of a ratio that it does not bound."""
    yield Case(
        "where the clip binds",
        lambda: loss_at(student, RATIO, ADVANTAGE)[1].float(),
        torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]]),
        [
            Mistake(
                (CLIPPED != RATIO).float(),
                "a ratio outside the clip is not enough: it binds where clipped*A < rho*A",
            ),
        ],
    )
    yield Case(
        "the loss at a ratio of 20 with A = -1",
        lambda: loss_at(student, torch.tensor([[20.0]]), torch.tensor([[-1.0]]))[0],
        torch.tensor([[3.0]]),
        [
            Mistake(
                torch.tensor([[20.0]]),
                "the clip does not bound this loss, and one such token would be the whole gradient: "
                "cap the ratio at RATIO_CAP",
            ),
        ],
    )


def gradient_cases(student: ModuleType) -> Iterator[Case]:
    """Yield the question to the gradient."""

    def gradient() -> Tensor:
        logp = RATIO.log().requires_grad_()
        loss, _ = student.ppo_loss(logp, torch.zeros_like(RATIO), ADVANTAGE, CLIP)
        loss.sum().backward()
        return logp.grad

    yield Case(
        "the gradient of the log-probs there: -rho*A where the clip does not bind, 0 where it does",
        gradient,
        torch.tensor([[0.0, -0.5, 1.5, 0.0, -2.0]]),
        [
            Mistake(
                RuntimeError,
                "the loss has no gradient: torch.zeros_like(RATIO) on its way from logp may be detached",
            ),
        ],
    )


def cases(student: ModuleType) -> Iterator[Case]:
    """Yield the questions to a student's file."""
    yield from value_cases(student)
    yield from clip_cases(student)
    yield from gradient_cases(student)
    generator = torch.Generator().manual_seed(0)
    logp, old_logp, advantage = torch.randn(3, 8, 12, generator=generator)
    yield Case(
        "random tokens",
        lambda: student.ppo_loss(logp, old_logp, advantage, CLIP)[0],
        rlfr.ppo_loss(logp, old_logp, advantage, CLIP)[0],
    )


def update(student: ModuleType, clip: tuple[float, float]) -> list[list[float]]:
    """Update a policy over four answers on ten samples; return its probabilities after each pass.

    Of ten samples one, the third answer, was right: it has a large advantage, by luck or not.
    """
    sampled = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 3, 3])
    right = (sampled == 2).float()
    advantage = rlfr.outcome_advantage(right, len(right), "grpo")
    logits = torch.tensor([0.4, 0.3, 0.1, 0.2]).log().requires_grad_()
    optimiser = torch.optim.SGD([logits], lr=1.0)
    old_logp = logits.log_softmax(0)[sampled].detach()
    passes = []
    for _ in range(16):
        passes.append(logits.softmax(0).tolist())
        logp = logits.log_softmax(0)[sampled]
        loss, _ = student.ppo_loss(logp[None], old_logp[None], advantage[None], clip)
        optimiser.zero_grad()
        loss.mean().backward()
        optimiser.step()
    return passes


def show(student: ModuleType) -> None:
    """Print how far a policy moves on the same samples, with the clip and without."""
    print(
        "Probability of the one answer in ten that was right, after updates on the same samples:\n"
    )
    print("  updates          0     1     2     4     8    15")
    for name, clip in (("clip (0.2, 0.28)", CLIP), ("no clip", NO_CLIP)):
        passes = update(student, clip)
        cells = "  ".join(f"{passes[k][2]:.2f}" for k in (0, 1, 2, 4, 8, 15))
        print(f"  {name:16} {cells}")
