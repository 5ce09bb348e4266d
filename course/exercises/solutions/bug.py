"""Solution of exercise 8: the episodes of a group must stand one behind the other.

outcome_advantage takes G consecutive rewards for a group, as rlfr.outcome_advantage does. With repeat()
such eight episodes answered eight problems. What an answer got was then decided by its problem: those
that pay well were always praised, and those that pay little always blamed, whatever the answer.
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
    # each problem G times in a row; repeat() deals 0 1 2 … 7 0 1 2 …, and a group then mixes problems
    problems = torch.arange(N_PROBLEMS).repeat_interleave(GROUP_SIZE)
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
