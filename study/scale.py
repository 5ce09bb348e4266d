"""The coefficient of a dense reward at which it weighs as much as any other in a study.

    python study/scale.py --folder FOLDER --shaping FILE.py [FLAGS of train_rl.py]

Rewards have scales of their own: bits, spreads, distances. A step is sampled and scored, and
nothing is learnt. What the reward then adds to the advantage of a token, at a coefficient of 1, has
some spread over the tokens. The coefficient that makes it SPREAD goes to FOLDER/coefficient.txt. The
outcome's own advantage has a spread of 1 in a group of right and wrong responses.
"""

import repository  # noqa: F401

# isort: split
from pathlib import Path

import dense
import train_rl
from infra import parallel
from infra.data import load_problems
from infra.files import written_whole
from infra.runs import launch
from infra.settings import change
from inspector import sample_and_score
from rewards import Grader
from worlds import PRESETS

SPREAD = 0.5


def main(config: train_rl.Config) -> None:
    """Write the coefficient. ValueError if there is no reward, or it says the same of all tokens."""
    parallel.start()
    if config.shaping in ("none", "entropy"):
        raise ValueError(f"--shaping {config.shaping}: expected a dense reward, flow or FILE.py")
    if config.folder is None:
        raise ValueError("--folder is not given; expected a folder for coefficient.txt")
    folder = Path(config.folder)
    config, model = train_rl.resolve(change(config, folder=None, dense_coef=1.0))
    problems = load_problems(config.data, config.problems, model)
    models = train_rl.make_models(config, model, is_flow_named=True)
    with Grader(config.reward, config.grading, config.sampling.max_tokens) as grader:
        experience = sample_and_score(config, model, problems, models, grader)
    spread = spread_of(experience, models.dense, config)
    with written_whole(folder / "coefficient.txt") as temporary:
        temporary.write_text(f"{SPREAD / spread:.4g}")
    print(
        f"a spread of {spread:.4g} at a coefficient of 1: {SPREAD / spread:.4g} makes it {SPREAD}"
    )


def spread_of(experience: train_rl.Experience, reward: dense.DenseReward, config) -> float:
    """Return the spread over tokens of what a reward adds to their advantages."""
    settings = config.dense_reward
    group_size = config.sampling.group_size
    mask = experience.mask
    scored = experience.scored
    rewards = dense.token_rewards(reward, experience.score, scored, settings, group_size)
    added = dense.credit(rewards, scored, mask, settings, group_size, config.advantage.baseline)
    spread = added[mask].std().item()
    if spread == 0:
        raise ValueError(
            f"{reward.name}: in the first step it adds the same to the advantages of all tokens "
            f"(clamp {settings.dense_clamp or reward.clamp}), so that its coefficient cannot be "
            "measured: give it, FILE.py:dense_coef=NUMBER"
        )
    return spread


if __name__ == "__main__":
    launch(main, train_rl.Config, PRESETS["train_rl"])
