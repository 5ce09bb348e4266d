"""The tables of docs/theory.md: what a flow's score keeps of a likelihood, in numbers.

    python -m course.theory        all of them, in some seconds

Latents here are Gaussian with mean 0 and a known spread s in each dimension, given their context, so
that the best guess of the velocity is known, and any flow is this guess with a mistake. Sections and
equation (1) are those of the page.
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import flow as fl
import rlfr

ROOT = Path(__file__).parents[1]
AT = torch.tensor([0.8])  # the time of the score
N_TOKENS = 2000


def best(s: float | Tensor, mistake: float | Tensor = 0.0) -> Callable:
    """Return the best v for Gaussian latents with spread s, its x̂_1 moved by a mistake."""

    def velocity(x_t: Tensor, t: Tensor, context: None, depth: None) -> Tensor:
        t = t[:, None]
        guess = x_t * (t * s**2 - (1 - t)) / (t**2 * s**2 + (1 - t) ** 2)
        return guess + mistake / (1 - t)

    return velocity


def mean_error(velocity: Callable, x_1: Tensor, t: Tensor) -> Tensor:
    """Return the mean of velocity errors over noise, (M,): that of -1 and 1 gives a mean square."""
    errors = [fl.velocity_error(velocity, x_1, None, None, x_0 + 0 * x_1, t) for x_0 in (-1, 1)]
    return sum(errors) / 2


def integrand(x: float, s: float, t: Tensor) -> Tensor:
    """Return t/(1-t) E(v - u)^2 of the best guess for one latent of spread s, at the times t."""
    return t / (1 - t) * mean_error(best(s), torch.full((len(t), 1), x), t)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of the ranks of two measures of the same tokens."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()])
    return torch.corrcoef(ranks.double())[0, 1].item()


def surprise(z: Tensor) -> Tensor:
    """Return -log p of latents z, (M, D) in spreads, but for a constant: (M,)."""
    return (z**2 / 2).sum(dim=1)


# ---- Its error bounds a likelihood
def print_bound() -> None:
    """Integrate the part with x, at x = 3, over time."""
    t = (torch.arange(2000) + 0.5) / 2000
    for s in (0.25, 1.0, 3.0):
        integral = (integrand(3.0, s, t) - integrand(0.0, s, t)).mean()
        print(f"spread {s:4}: {integral:5.2f} from the integral, {4.5 / s**2:5.2f} from x²/2s²")


# ---- Which dimensions count
def print_dimensions() -> None:
    """Print what a dimension of spread s adds to the sum over dimensions."""
    weight = 0.8 / (1 - 0.8) ** 3  # of a squared distance of x̂_1, by (1)
    print("spread   3 spreads away   expert   s/10 off")
    for s in (1.0, 2.0, 7.1, 35.0):
        away = (integrand(3 * s, s, AT) - integrand(0.0, s, AT)).item()  # true: 9/2
        expert = integrand(s, s, AT).item()  # the mean over experts, as x² has the mean s²
        print(f"{s:6}{away:17.3f}{expert:9.2f}{weight * (s / 10) ** 2:11.2f}")


def print_mistakes(distance: Tensor, generator: torch.Generator) -> None:
    """Rank tokens by a score with mistakes, in 100 dimensions of spread 1 and some wide ones."""
    print("wide dimensions   s/10, same for all tokens   s/10, varying   s/50, varying")
    for n_wide, wide in ((0, 1.0), (1, 7.1), (10, 7.1), (1, 35.0)):
        s = torch.tensor([1.0] * 100 + [wide] * n_wide)
        z = distance * torch.randn(N_TOKENS, len(s), generator=generator)  # latents in spreads
        same = torch.randn(1, len(s), generator=generator)
        varying = torch.randn(N_TOKENS, len(s), generator=generator)
        line = f"{n_wide} of spread {wide:4}" if n_wide else "none"
        line = f"{line:18}"
        for width, mistake in ((25, same * s / 10), (13, varying * s / 10), (13, varying * s / 50)):
            score = mean_error(best(s, mistake), z * s, AT)
            line += f"   {rank_correlation(score, surprise(z)):{width}.2f}"
        print(line)


# ---- What one time and one draw keep
def print_draws(distance: Tensor, generator: torch.Generator) -> None:
    """Rank tokens by the best flow's score from some times and draws, in 128 dimensions."""
    z = distance * torch.randn(N_TOKENS, 128, generator=generator)
    twenty = [k / 20 + 0.025 for k in range(20)]
    kinds = (([0.8], 1), ([0.8], 8), ([0.8], 160), (twenty, 8))
    print("spread   1 time, 1 draw   1 time, 8 draws   1 time, 160 draws   20 times, 8 draws")
    for s in (1.0, 2.0, 7.1):
        line = f"{s:6}"
        for times, n_draws in kinds:
            score = torch.zeros(N_TOKENS)
            for _ in range(n_draws):
                noise = torch.randn(N_TOKENS, 128, generator=generator)
                errors = fl.errors_at(times, best(s), z * s, None, None, noise)
                score += fl.deviation_score(errors, times)
            line += f"{rank_correlation(score, surprise(z)):17.2f}"
        print(line)


# ---- The likelihood of what?
def with_interval(values: list[float]) -> str:
    """Format an estimate and the ends of its 95 % interval."""
    estimate, low, high = (f"{value:.2f}" for value in values)
    return f"{estimate:>5} ({low} – {high})"


def print_measured() -> None:
    """Print what was measured in the world `toy`; docs/evidence.md shows it, too."""
    toy = json.loads((ROOT / "study" / "signal.json").read_text())["worlds"]["toy"]
    print("AUC for wrong steps")
    for amount, length in ((1, "four"), (5, "twenty")):
        fitted = dict(context="previous", is_standardised=False, amount=amount)
        fit = next(fit for fit in toy["fits"] if fitted.items() <= fit.items())
        at_08 = next(row for row in fit["times"] if row["time"] == 0.8)
        line = f"score, flow of {length} epochs"
        print(f"    {line:30}{with_interval(at_08['steps']['score'])}")
    print(f"    {'-log-prob':30}{with_interval(toy['baselines']['-log-prob']['steps'])}")
    steps = {point["step"] for point in toy["drift"]}
    print(f"{'excess after step':33}", *(f"{step:5}{'':16}" for step in sorted(steps)))
    for flow in ("offline", "updated"):
        points = (point for point in toy["drift"] if point["flow"] == flow)
        cells = (f"{with_interval(point['excess complete']):21}" for point in points)
        print(f"    {f'{flow} flow':29}", *cells)


# ---- From the policy gradient to token returns
def print_credit() -> None:
    """Print the weights of a right response's tokens, in a group of four with two right."""
    mask = torch.ones(1, 8, dtype=torch.bool)
    reward = torch.tensor([[0, 0, -0.3, 0, 0, -0.2, 0, 0]])  # large, to be seen
    outcome = rlfr.outcome_advantage(torch.tensor([1.0, 0, 1, 0]), 4, "grpo")[0]
    rows = {"reward": reward[0], "GRPO": outcome + torch.zeros(8)}
    for gamma in (1.0, 0.0):
        rows[f"γ = {gamma:.0f}"] = outcome + rlfr.token_returns(reward, mask, gamma)[0]
    for name, row in rows.items():
        print(f"{name:6}", *(f"{value:5.2f}" for value in row))


# ---- Level and length
def print_length(generator: torch.Generator) -> None:
    """Print the published reward of responses whose scores are drawn alike for every token."""
    print("length   scores from 5 to 6   scores from 45 to 46")
    for length in (10, 20, 40, 80):
        scores = 5 + torch.rand(N_TOKENS, length, generator=generator)
        mask = torch.ones(N_TOKENS, length, dtype=torch.bool)
        line = f"{length:6}"
        for level in (0, 40):
            penalties = rlfr.select(rlfr.normalise(scores + level, mask, False), 0.6, 15, False)
            line += f"{-0.01 * penalties.sum(dim=1).mean():21.3f}"
        print(line)


def main() -> None:
    """Print all tables, a blank line after each."""
    generator = torch.Generator().manual_seed(0)
    distance = torch.exp(0.3 * torch.randn(N_TOKENS, 1, generator=generator))  # of each token
    for table in (
        print_bound,
        print_dimensions,
        lambda: print_mistakes(distance, generator),
        lambda: print_draws(distance, generator),
        print_measured,
        print_credit,
        lambda: print_length(generator),
    ):
        table()
        print()


if __name__ == "__main__":
    main()
