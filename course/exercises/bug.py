"""Exercise 8, 20 minutes: a program that runs, prints plausible figures, and is wrong.

GRPO in small: a policy that is a table of logits, one row for each of N problems, learns which of A
answers is the best. An answer to problem n earns worth[n, a]; easy problems pay well whatever one
answers. Every tensor has the right shape, the reward rises, and nothing fails.

    python course/exercises/bug.py

It has one bug. Find it, mend it in this file, and leave the rest as it is. What the program prints is
what you have to go by: the best of four answers has a chance of 0.25 at first, and with the bug also
after 60 steps.

Bar: on three seeds, the policy gives the best answer to every problem with a chance above 0.9.
"""

import torch
from torch import Tensor

N_PROBLEMS = 8
N_ANSWERS = 4
GROUP_SIZE = 8  # G, answers that are sampled to a problem
N_STEPS = 61
RATE = 2.0


def make_worth() -> Tensor:
    """Return what each answer earns, (N, A): the last one earns 0.1 more than the others."""
    of_problem = torch.arange(N_PROBLEMS) / 2  # what it pays at least
    worth = of_problem[:, None].repeat(1, N_ANSWERS)
    worth[:, -1] += 0.1
    return worth


def sample(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample G answers to each problem; return problems and answers, (N * G,) each."""
    problems = torch.arange(N_PROBLEMS).repeat(GROUP_SIZE)
    probabilities = logits.softmax(dim=1)[problems]  # (N * G, A)
    answers = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return problems, answers


def outcome_advantage(reward: Tensor) -> Tensor:
    """Return (r - mean)/(std + eps) of rewards (N * G,) within their groups of G."""
    groups = reward.view(-1, GROUP_SIZE)  # (N, G)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-3)).flatten()


def policy_loss(logits: Tensor, problems: Tensor, answers: Tensor, advantage: Tensor) -> Tensor:
    """Return minus the mean of advantage times log-prob."""
    logp = logits.log_softmax(dim=1)[problems, answers]  # (N * G,)
    return -(advantage * logp).mean()


def train(worth: Tensor, seed: int = 0, log_every: int = 0) -> Tensor:
    """Train a policy on answers that earn worth (N, A); return its probabilities, (N, A)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(N_PROBLEMS, N_ANSWERS, requires_grad=True)
    optimiser = torch.optim.SGD([logits], lr=RATE)
    for step in range(N_STEPS):
        problems, answers = sample(logits, generator)
        reward = worth[problems, answers]
        loss = policy_loss(logits, problems, answers, outcome_advantage(reward))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if log_every and step % log_every == 0:
            best = logits.softmax(dim=1)[:, -1]
            print(f"step {step:3}  reward {reward.mean():.3f}  best answer: ", end="")
            print(" ".join(f"{chance:.2f}" for chance in best))
    return logits.softmax(dim=1).detach()


if __name__ == "__main__":
    print("chances of the best answer to problem 0, which pays least, to problem 7")
    train(make_worth(), log_every=10)
