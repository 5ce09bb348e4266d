"""The entropy advantage with an alpha of one's own: train_rl.py has the paper's alone.

    python study/entropy.py [--alpha A] FLAGS of train_rl.py

It is train_rl.py but for one phase: the update gets advantages to which min(alpha*H, |A|/kappa) is
added, rlfr.entropy_advantage. With alpha 0.4 that is what `--shaping entropy` does.
"""

import repository  # noqa: F401

# isort: split
import argparse
import sys
from functools import partial

from torch import Tensor

import rlfr
import train_rl
from infra.runs import launch
from worlds import PRESETS


def update(
    models: train_rl.Models,
    experience: train_rl.Experience,
    advantage: Tensor,
    alpha: float,
    **rest,
) -> dict[str, float]:
    """Take the place of train_rl.update_policy: a step with the entropy advantage."""
    shaped = rlfr.entropy_advantage(advantage, experience.entropy, alpha) * experience.mask
    return train_rl.update_policy(models, experience, shaped, **rest)


def main() -> None:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--alpha", type=float, default=0.4)
    arguments, flags = parser.parse_known_args()
    sys.argv[1:] = flags
    with_alpha = partial(update, alpha=arguments.alpha)
    launch(partial(train_rl.main, update=with_alpha), train_rl.Config, PRESETS["train_rl"])


if __name__ == "__main__":
    main()
