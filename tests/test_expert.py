"""The score against expert tokens: statistics by hand, reward on response or token."""

import json
from pathlib import Path

import pytest
import torch
from conftest import experience_of, read_lines, score_and_learn, shape_advantage, small_run
from safetensors.torch import load_file

import flow as fl
import rlfr
import train_flow
import train_rl
from infra import parallel
from infra.settings import change
from infra.solutions import load_solutions
from policy import Policy

SCALE = fl.ExpertScale(mean=torch.tensor([[1.0, 2.0]]), spread=torch.tensor([[0.5, 0.1]]))


# ---- flow.py
def test_excess_is_in_spreads_of_the_rows_tap():
    errors = torch.tensor([[1.5, 2.0, 2.3]])
    excess = fl.excess_score(errors, torch.tensor([0, 1, 1]), SCALE)
    torch.testing.assert_close(excess, torch.tensor([1.0, 0.0, 3.0]))


def test_excess_is_averaged_over_times():
    scale = fl.ExpertScale(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [2.0]]))
    errors = torch.tensor([[2.0, 1.0], [3.0, 7.0]])
    excess = fl.excess_score(errors, torch.tensor([0, 0]), scale)
    torch.testing.assert_close(excess, torch.tensor([0.5, 1.0]))


def rows_of(config: fl.FlowConfig, latents: list[torch.Tensor]) -> fl.FlowRows:
    everything = torch.ones(latents[0].shape[:2], dtype=torch.bool)
    depths = [0.1 * tap for tap in range(len(latents))]
    return fl.make_rows(config, latents, depths, everything, everything)


def test_rows_know_their_taps():
    config = fl.FlowConfig(dim=2, contexts=("previous", "self"), percentiles=(0.25, 0.5))
    rows = rows_of(config, [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)])
    # of each tap two positions with a previous one, and three with themselves
    assert rows.taps().tolist() == [0] * 5 + [1] * 5


def test_the_score_against_experts_is_the_scaled_error():
    """Without a velocity the error is the mean square of x_1 - x_0, here of x_1."""
    config = fl.FlowConfig(dim=2, contexts=("self",), percentiles=(0.25, 0.5))
    latents = [torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[2.0, 0.0]]])]
    rows = rows_of(config, latents)
    flow = fl.Flow(config)  # a new one has no velocity
    score, loss = score_and_learn(flow, rows, torch.zeros(2, 1, 1, 2), [0.8], scale=SCALE)
    errors = [1.0, 2.0]
    expected = ((errors[0] - 1.0) / 0.5 + (errors[1] - 2.0) / 0.1) / 2
    assert score.item() == pytest.approx(expected, abs=1e-5)
    assert loss.item() == pytest.approx(1.5), "the loss is not scaled"


def test_latents_are_standardised_for_each_tap_and_dimension():
    config = fl.FlowConfig(dim=2, contexts=("self",), percentiles=(0.25, 0.5), standardised=True)
    flow = fl.Flow(config)
    flow.latent_mean.copy_(torch.tensor([[1.0, 0.0], [0.0, 10.0]]))
    flow.latent_spread.copy_(torch.tensor([[2.0, 1.0], [1.0, 5.0]]))
    rows = rows_of(config, [torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[6.0, 20.0]]])])
    standard = flow.standardise(rows)
    torch.testing.assert_close(standard.x_1, torch.tensor([[1.0, 4.0], [6.0, 2.0]]))
    torch.testing.assert_close(standard.context, standard.x_1)
    plain = fl.Flow(fl.FlowConfig(dim=2, contexts=("self",), percentiles=(0.25, 0.5)))
    assert plain.standardise(rows) is rows


def test_a_scale_that_was_not_measured_is_refused():
    flow = fl.Flow(fl.FlowConfig(dim=2, calibrated_at=(0.5, 0.8)))
    with pytest.raises(ValueError, match="offline start had not ended"):
        flow.expert_scale([0.5])
    flow.expert_spread.fill_(1.0)
    flow.expert_mean.copy_(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert flow.expert_scale([0.8]).mean.tolist() == [[4.0, 5.0, 6.0]]
    with pytest.raises(ValueError, match=r"not at \[0.9\].*--calibrate-at"):
        flow.expert_scale([0.8, 0.9])


# ---- rlfr.py
def test_mean_over_tokens_counts_the_mask_alone():
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert rlfr.mean_over_tokens(values, mask).tolist() == [2.0, 0.0]


def test_centred_rewards_sum_to_zero_over_the_group():
    reward = torch.tensor([[-1.0, -1.0, -1.0], [-4.0, 9.0, 9.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0]]).bool()
    centred = rlfr.centre(reward, mask, 2)
    # means of the groups: -7/4 and -2/5
    expected = torch.tensor([[0.75, 0.75, 0.75], [-2.25, 0, 0], [-1.6, 0.4, 0.4], [0.4, 0.4, 0.0]])
    torch.testing.assert_close(centred, expected)


# ---- train_rl.py
def right_episodes(excess: torch.Tensor, mask: torch.Tensor) -> train_rl.Experience:
    """Experience of episodes that are all right."""
    return experience_of(mask, dense_score=excess[None], reward=torch.ones(len(mask)))


def test_the_mean_excess_of_a_response_joins_the_outcome():
    """In a group of equal outcome the more expert-like response is the better one."""
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    excess = torch.tensor([[9.0, -9.0, 6.0], [4.0, 0.0, 0.0]])  # means 2 and 4
    config = change(
        train_rl.Config(),
        flow_scope="expert",
        dense_on="response",
        dense_coef=0.05,
        group_size=2,
        baseline="dr_grpo",
    )
    advantage, _, metrics = shape_advantage(right_episodes(excess, mask), config)
    # -0.5 * 0.2 and -0.5 * 0.4, less their mean
    torch.testing.assert_close(advantage, torch.tensor([[0.05, 0.05, 0.05], [-0.05, 0.0, 0.0]]))
    assert metrics["flow/reward"] == pytest.approx(-0.15), "of a response, not of its tokens"


def advantages(excess: list[float], reward: list[float], coef: float) -> torch.Tensor:
    """The advantages of responses of a token each, with `--dense-on response` and grpo."""
    experience = experience_of(
        torch.ones(len(excess), 1).bool(),
        dense_score=torch.tensor(excess)[None, :, None],
        reward=torch.tensor(reward),
    )
    config = change(
        train_rl.Config(),
        flow_scope="expert",
        dense_on="response",
        dense_coef=coef / 2,
        dense_clamp=(-2.0, 0.0),
        group_size=len(excess),
    )
    advantage, _, _ = shape_advantage(experience, config)
    return advantage.squeeze(1)


@pytest.mark.parametrize("coef", [1.0, 0.01, 1e-4])
def test_the_coefficient_counts_in_a_group_of_equal_outcomes(coef):
    """Regression: grpo divided by the spread of the flow's rewards, whatever their coefficient."""
    # rewards -coef * (0.1, 0.3, 0.8, 0), less their mean
    expected = coef * torch.tensor([0.2, 0.0, -0.5, 0.3])
    for outcome in (0.0, 1.0):
        got = advantages([0.2, 0.6, 1.6, 0.0], [outcome] * 4, coef)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("coef", [0.3, 0.01])
def test_a_right_response_stays_above_a_wrong_one(coef):
    """The outcome advantage is what it is without a flow; the flow orders equals."""
    got = advantages([1.6, 0.2, 0.6, 0.0], [1.0, 1.0, 0.0, 0.0], coef)
    # outcomes ±1/2 over 1/sqrt(3); rewards -coef * (0.8, 0.1, 0.3, 0), less their mean
    outcome = 0.75**0.5 * torch.tensor([1.0, 1.0, -1.0, -1.0])
    torch.testing.assert_close(got, outcome + coef * torch.tensor([-0.5, 0.2, 0.0, 0.3]))
    assert got[:2].min() > got[2:].max()
    assert got[1] > got[0]


def test_nothing_is_penalised_in_what_looks_like_an_experts():
    mask = torch.ones(2, 3, dtype=torch.bool)
    excess = torch.tensor([[-0.5, 0.0, 0.4], [-1.0, -1.0, -1.0]])
    config = change(
        train_rl.Config(), flow_scope="expert", dense_on="response", dense_coef=1.0, group_size=2
    )
    advantage, _, _ = shape_advantage(right_episodes(excess, mask), config)
    assert not advantage.any()


def test_excess_acts_on_tokens():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    excess = torch.tensor([[0.0, 5.0, 20.0], [0.0, 0.0, 0.0]])
    config = change(train_rl.Config(), flow_scope="expert", dense_coef=0.1, group_size=2, gamma=0.5)
    advantage, _, _ = shape_advantage(right_episodes(excess, mask), config)
    # penalties 0, 0.5, 1, discounted by 0.5
    expected = torch.tensor([[-0.5, -1.0, -1.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(advantage, expected)


def test_expert_scope_needs_a_calibrated_flow(config_of_a_step):
    with pytest.raises(ValueError, match="flow_scope=expert needs a flow"):
        train_rl.main(change(config_of_a_step, flow="new", flow_scope="expert"))
    with pytest.raises(ValueError, match=r"calibrated at the times \(0.5, 0.8\), not at \[0.3\]"):
        train_rl.main(change(config_of_a_step, flow_scope="expert", reward_times=(0.3,)))


@pytest.fixture
def config_of_a_step(world, flow_folder, tmp_path) -> train_rl.Config:
    folder = tmp_path / "run"
    return small_run(world, flow_folder, folder, prompts=2, max_tokens=8, steps=1, flow_lr=1e-4)


# ---- train_flow.py
@pytest.fixture(scope="module")
def offline(world, tmp_path_factory) -> train_flow.Config:
    """A short offline start that standardises and calibrates, and has been run."""
    config = change(
        train_flow.Config(),
        model=world.path("model"),
        data=world.path("expert.jsonl"),
        template="none",
        batch_size=8,
        epochs=1,
        flow_blocks=1,
        noise_repeats=1,
        max_prompt_tokens=30,
        standardise=True,
        held_out=8,
        calibrate_at=(0.5, 0.8),
        save_every=0,
        folder=str(tmp_path_factory.mktemp("offline") / "run"),
    )
    train_flow.main(config)
    return config


def latents_of(config: train_flow.Config, flow: fl.Flow, policy: Policy) -> train_flow.Latents:
    parallel.start()
    resolved, model = train_flow.resolve(change(config, folder=None))
    solutions = load_solutions(config.data, resolved.solutions, model)
    return train_flow.Latents(policy, flow.config, solutions, 4096)


def test_calibration_is_the_error_on_what_was_held_out(offline, policy):
    flow = fl.load_flow(Path(offline.folder) / "flow", 32)
    latents = latents_of(offline, flow, policy)
    errors = {0: [], 1: [], 2: []}
    for index in range(40, 48):
        _, rows = next(latents.flow_rows([index]))
        rows = flow.standardise(rows)
        n_tokens = latents.response_length(index)
        key = ("calibration noise", offline.seed, index - 40)
        noise, _ = fl.draw(flow.config, [key], [n_tokens], parallel.DEVICE)
        for tap in range(3):
            chosen = rows.taps() == tap
            t = torch.full((1,), 0.8)
            depth = rows.depth[tap, None]
            inputs = (rows.x_1[chosen], rows.context[chosen], depth, noise[rows.exists][chosen])
            with torch.no_grad():
                errors[tap].append(fl.velocity_error(flow, *inputs, t))
    scale = flow.expert_scale([0.8])
    for tap in range(3):
        found = torch.cat(errors[tap])
        torch.testing.assert_close(scale.mean[0, tap], found.mean(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            scale.spread[0, tap], found.std(correction=0), rtol=1e-3, atol=1e-5
        )


def test_standardised_latents_have_mean_0_and_spread_1(offline, policy):
    flow = fl.load_flow(Path(offline.folder) / "flow", 32)
    latents = latents_of(offline, flow, policy)
    parts = []
    for _, rows in latents.flow_rows(range(40)):
        standard = flow.standardise(rows)
        parts.append(standard.x_1[standard.taps() == 1])
    x_1 = torch.cat(parts)
    torch.testing.assert_close(x_1.mean(dim=0), torch.zeros(32), rtol=0, atol=1e-4)
    spread = x_1.std(dim=0, correction=0)
    assert spread.max() < 1.001 and spread.median() > 0.99


def test_what_was_held_out_is_not_trained_on(offline, world, tmp_path):
    """Other held-out solutions change the calibration, and what was trained only by rounding.

    Latents of all solutions are computed together. A step of the flow changes a weight by up to 1e-4.
    """
    lines = Path(world.path("expert.jsonl")).read_text().splitlines()
    data = tmp_path / "expert.jsonl"
    data.write_text("\n".join([*lines[:40], *lines[:8]]) + "\n")
    config = change(offline, data=str(data), folder=str(tmp_path / "run"))
    train_flow.main(config)
    one = load_file(Path(offline.folder) / "flow" / fl.FLOW_FILE)
    other = load_file(Path(config.folder) / "flow" / fl.FLOW_FILE)
    difference = {name: (tensor - other[name]).abs().max() for name, tensor in one.items()}
    changed = {name for name, largest in difference.items() if largest > 1e-8}
    assert changed == {"expert_mean", "expert_spread"}


def test_latents_that_do_not_fit_are_computed_each_time(offline, tmp_path, monkeypatch):
    monkeypatch.setattr(train_flow, "KEPT_BYTES", 0)
    config = change(offline, folder=str(tmp_path / "run"))
    train_flow.main(config)
    kept = read_lines(Path(offline.folder) / "metrics.jsonl")
    computed = read_lines(Path(config.folder) / "metrics.jsonl")
    for one, other in zip(kept, computed, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_the_flow_file_says_what_was_done(offline):
    settings = json.loads((Path(offline.folder) / "flow.json").read_text())
    assert settings["standardised"] and settings["calibrated_at"] == [0.5, 0.8]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"held_out": -1}, "--held-out=-1: expected a whole number from 0"),
        ({"held_out": 30}, "held_out=30 of 48"),
        ({"calibrate_at": (1.0,)}, "--calibrate-at=1.0: expected a number between 0 and 1"),
    ],
)
def test_bad_settings(offline, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        train_flow.main(change(offline, folder=str(tmp_path / "run"), **options))
