"""Each option of the advantage, the loss and the flow changes what comes out, one at a time.

The options that tests/test_train.py changes one at a time are not repeated here.
"""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import experience_of, figures, shape_advantage
from test_train import OPTIONS

import dense
import flow as fl
import rlfr
import train_flow
import train_rl
from infra.settings import change
from policy import load_policy


def differ(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two networks differ in a parameter."""
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)


# ---- The policy

POLICY_OPTIONS = [  # what both runs have, what one has besides
    ({}, {"baseline": "dr_grpo"}),
    ({}, {"normalisation": "constant"}),
    # in the first mini-batch, where all ratios are 1, the losses have the same gradient
    ({"train_batch": 4, "lr": 3e-2}, {"loss": "gspo"}),
    ({"train_batch": 4, "lr": 3e-2}, {"loss": "cispo"}),
    ({}, {"kl_coef": 0.1}),
    ({"dtype": "bfloat16"}, {"mismatch": "none"}),  # in float32 all ratios are 1, to rounding
    ({"mismatch_cap": 0.5}, {"mismatch": "mask"}),  # weights of 0, and of 0.5
    ({"mismatch": "mask"}, {"mismatch_cap": 0.5}),
    ({}, {"train_batch": 16}),
    ({}, {"lr": 1e-4}),
    ({}, {"warmup": 1.0}),
    ({}, {"weight_decay": 0.1}),
    ({"shaping": "none"}, {"clip_norm": 1e-3}),
    ({"dense_coef": 1.0}, {"flow_scope": "expert"}),
    ({"dense_coef": 1.0, "flow_scope": "expert"}, {"dense_clamp": (-0.05, 0.0)}),
    ({"dense_coef": 1.0, "flow_scope": "expert"}, {"dense_on": "response"}),
    ({"dense_coef": 1.0}, {"dense_centre": True}),
    ({"dense_coef": 1.0}, {"contexts": ("next",)}),
    ({}, {"lora_rank": 4}),
]
# Elsewhere: epochs below, freeze in tests/test_vision.py (what does not learn: the vision tower)
# and in tests/test_dense.py, settings of a file and dense_until
ELSEWHERE = {"epochs", "freeze", "dense", "dense_until"}


def named(options: dict) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


@pytest.mark.parametrize(("both", "options"), POLICY_OPTIONS, ids=named)
def test_an_option_changes_the_policy(config, train_once, both, options):
    config = change(config, **both)
    without = train_once(config)
    train_rl.main(change(config, **options))
    policies = [load_policy(f"{folder}/policy") for folder in (without, config.folder)]
    assert differ(*policies)


def test_epochs_are_passes_over_the_problems(config):
    """64 problems, 32 a step."""
    config = change(config, steps=None, prompts=32, group_size=2, train_batch=64, max_tokens=4)
    for epochs in (1, 2):
        folder = f"{config.folder}-{epochs}"
        train_rl.main(change(config, folder=folder, epochs=epochs))
        assert len(figures(folder)) == 2 * epochs


def test_every_option_of_advantage_loss_and_flow_reward_is_tested():
    """A new field of these settings needs a run above, or in tests/test_train.py."""
    tested = set(ELSEWHERE)
    for _, options in [*OPTIONS, *POLICY_OPTIONS, *FLOW_OPTIONS]:
        tested |= options.keys()
    for settings in (
        train_rl.AdvantageSettings,
        dense.DenseSettings,
        dense.FlowRewardSettings,
        dense.FlowUpdateSettings,
        train_rl.OptimisationSettings,
    ):
        assert {field.name for field in fields(settings)} <= tested, settings


# ---- Advantages


@pytest.mark.parametrize("baseline", ["grpo", "rloo", "dr_grpo", "reinforce++", "reinforce"])
def test_only_reinforce_plus_plus_is_whitened(baseline):
    """Departure: the official code whitens the advantages of all but GRPO."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    config = change(train_rl.Config(), shaping="none", baseline=baseline, group_size=2)
    reward = torch.tensor([3.0, 0.0])
    experience = experience_of(mask, reward=reward)
    advantage, _, _ = shape_advantage(experience, config)
    outcome = rlfr.outcome_advantage(reward, 2, baseline)
    is_whitened = not torch.equal(advantage, outcome[:, None] * mask)
    assert is_whitened == (baseline == "reinforce++")


# ---- The flow, online

FLOW_OPTIONS = [
    ({}, {"flow_lr": 0.0}),
    ({}, {"flow_lr": 1e-4}),
    ({}, {"flow_soft": 1.0}),
    ({}, {"flow_soft": 0.5}),
    ({}, {"flow_entropy_quantile": 0.8}),
    ({"flow_entropy_quantile": 0.8}, {"flow_soft": 0.5}),
    ({}, {"flow_times": "random"}),
    ({"flow_times": "random"}, {"flow_times": "uniform"}),
    ({"steps": 1}, {"clip_norm": 1e-6}),  # scored before the policy has changed
    ({}, {"reward_times": (0.5,)}),
    ({"flow": "new"}, {"contexts": ("self",)}),
    ({"flow": "new"}, {"percentiles": (0.25,)}),
]


@pytest.mark.parametrize(("both", "options"), FLOW_OPTIONS, ids=named)
def test_an_option_changes_the_flow(config, train_once, both, options):
    """Some episodes are accepted, and some are not: rewards are 0, 1 and 2."""
    config = change(config, **both)
    without = train_once(config)
    train_rl.main(change(config, **options))
    assert 0 < figures(without)[0]["correct"] < 1
    flows = [fl.load_flow(f"{folder}/flow", 32) for folder in (without, config.folder)]
    assert differ(*flows)


# ---- The offline start

OFFLINE_OPTIONS = [
    {"contexts": ("next",)},
    {"percentiles": (0.5,)},
    {"epochs": 2},
    {"batch_size": 8},
    {"lr": 1e-4},
    {"seed": 1},
    {"flow_blocks": 1},
    {"noise_repeats": 1},
    {"flow_times": "uniform"},
    {"shift": 2},
    {"warmup": 1.0},
    {"weight_decay": 0.5},
    {"clip_norm": 1e-3},
    {"cutoff": 40},
    {"standardise": True},
    {"held_out": 8},
    {"calibrate_at": (0.4,)},
]


@pytest.fixture
def offline_config(world) -> train_flow.Config:
    """Three small steps of the offline start."""
    return change(
        train_flow.Config(),
        model=world.path("model"),
        data=world.path("expert.jsonl"),
        template="none",
        batch_size=16,
        lr=1e-3,
        epochs=1,
        flow_blocks=2,
        noise_repeats=2,
        max_prompt_tokens=30,
        save_every=0,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Where the runs of the offline start are; the one without an option is made once."""
    return tmp_path_factory.mktemp("offline")


@pytest.mark.parametrize("options", OFFLINE_OPTIONS, ids=named)
def test_an_option_changes_the_offline_start(offline_config, folders, options):
    plain = folders / "plain"
    if not plain.exists():
        train_flow.main(change(offline_config, folder=str(plain)))
    changed = folders / named(options)
    train_flow.main(change(offline_config, folder=str(changed), **options))
    states = [fl.load_flow(folder / "flow", 32).state_dict() for folder in (plain, changed)]
    same = states[0].keys() == states[1].keys()
    for one, other in zip(states[0].values(), states[1].values(), strict=False):
        same = same and torch.equal(one, other)
    assert not same


def test_every_option_of_the_offline_start_is_tested():
    """A new field of these settings needs a run above."""
    tested = set()
    for options in OFFLINE_OPTIONS:
        tested |= options.keys()
    for settings in (train_flow.FlowSettings, train_flow.OptimisationSettings):
        assert {field.name for field in fields(settings)} <= tested, settings


def test_kl_is_taken_from_the_rewards_of_tokens():
    mask = torch.tensor([[True, True, True], [True, True, False]])
    logp = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, 0.0]])
    reference = torch.tensor([[-1.5, -2.0, -2.0], [-1.0, -3.0, 0.0]])
    experience = experience_of(mask, old_logp=logp, sampled_logp=logp, ref_logp=reference)
    settings = {"shaping": "none", "group_size": 2, "kl_coef": 0.1, "kl_kind": "k1"}
    kl = change(train_rl.Config(), kl_in="reward", **settings)
    advantage, _, metrics = shape_advantage(experience, kl)
    # log-ratios [[0.5, 0, -1], [0, 2]], summed from each token to the end
    expected = -0.1 * torch.tensor([[-0.5, -1.0, -1.0], [2.0, 2.0, 0.0]])
    torch.testing.assert_close(advantage, expected)
    assert metrics["kl_reward"] == pytest.approx(-0.1 * 1.5 / 5)
    loss = change(train_rl.Config(), kl_in="loss", **settings)
    advantage, _, _ = shape_advantage(experience, loss)
    assert not advantage.any()
