"""Expert solutions as episodes of their groups: the weight, the loss by hand, a step."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_lines, small_run

sys.path.append(str(ROOT / "study"))
import luffy
from infra.batching import Row
from infra.settings import change


def test_the_weight_of_an_experts_token_by_hand():
    """f(p) = p/(p + 0.1), whose slope by log p is 0.1 * p/(p + 0.1)**2."""
    logp = torch.tensor([0.1, 0.4, 0.001]).log().requires_grad_()
    weight = luffy.shaped_weight(logp)
    weight.sum().backward()
    assert weight.tolist() == pytest.approx([0.5, 0.8, 0.001 / 0.101])
    assert logp.grad.tolist() == pytest.approx([0.25, 0.04 / 0.25, 1e-4 / 0.101**2])


@pytest.fixture
def config(world, tmp_path):
    """RL on the small world, an optimiser step a batch."""
    settings = {"shaping": "none", "reward": ("binary",), "problem_column": "problem"}
    return small_run(world, None, tmp_path / "run", train_batch=16, **settings)


def test_the_gradient_of_own_and_expert_tokens_by_hand(config):
    """Two episodes of two tokens, weighed as a mean of means: 1/4 each."""
    logp = torch.tensor([[0.5, 0.5], [0.1, 0.4]]).log().requires_grad_()
    episodes = [Row([1], [2, 3]), Row([1], [4, 5])]
    advantage = torch.tensor([[-1.0, -1.0, 0.0], [2.0, 2.0, 0.0]])
    config = change(config, normalisation="sequence")
    loss = luffy.learn(
        lambda batch, temperature: SimpleNamespace(logp=logp),
        episodes,
        advantage,
        torch.tensor([False, True]),
        config,
    )
    # own: -ratio * A = 1; expert: -f(p) * 2
    assert loss == pytest.approx((1 + 1 - 2 * 0.5 - 2 * 0.8) / 4)
    slopes = [[0.25, 0.25], [-2 * 0.25 / 4, -2 * 0.16 / 4]]
    assert torch.allclose(logp.grad, torch.tensor(slopes))


def test_steps_with_expert_episodes(config, world, monkeypatch):
    """Each of the two steps has groups of all answers and of the solution, which is right."""
    seen = []
    sample_groups = luffy.MixedUpdate.sample_groups

    def watched(*arguments):
        seen.append(sample_groups(*arguments))
        return seen[-1]

    monkeypatch.setattr(luffy.MixedUpdate, "sample_groups", watched)
    luffy.train(config, world.path("expert.jsonl"), n_held_out=8, n_prompts=2)
    group_size = config.sampling.group_size
    solutions = {row["problem"]: row["solution"] for row in read_lines(world.path("expert.jsonl"))}
    held_out = list(solutions)[-8:]
    assert [len(groups) for groups in seen] == [2, 2]
    for group in [*seen[0], *seen[1]]:
        *answers, expert = group
        assert len(answers) == group_size
        assert all(episode.problem == expert.problem for episode in answers)
        assert expert.text == solutions[expert.problem.text]
        assert expert.problem.text not in held_out
        assert expert.verdict.correct
        assert all(episode.verdict is not None for episode in answers)
    lines = read_lines(Path(config.folder, "metrics.jsonl"))
    assert [line["policy/grad_norm"] > 0 for line in lines] == [True, True]


def test_settings_that_the_update_does_not_know(config, world):
    for changes, words in (
        ({"train_batch": 8}, "one optimiser step a batch; expected prompts . group_size = 16"),
        ({"entropy_coef": 0.1}, "has no token_entropy"),
    ):
        with pytest.raises(ValueError, match=words):
            luffy.train(change(config, **changes), world.path("expert.jsonl"), 8, 2)
    with pytest.raises(ValueError, match="--expert-prompts 0: expected 1 or more"):
        luffy.train(config, world.path("expert.jsonl"), 8, 0)
