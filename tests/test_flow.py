"""The flow: analytic fields, context modes, weights of several times, keyed noise, files."""

import json
from dataclasses import asdict

import pytest
import torch
from conftest import score_and_learn
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import flow as fl

CPU = torch.device("cpu")


class LinearField(torch.nn.Module):
    """v = x_t/2 - context/4: its error at x_1, x_0, t is known in closed form."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.tensor(0.5))
        self.b = torch.nn.Parameter(torch.tensor(-0.25))

    def forward(self, x_t, t, context, depth):
        return self.a * x_t + self.b * context


def random_vectors(n: int, dim: int = 4) -> list[torch.Tensor]:
    """Draw x_1, x_0 and context, (n, dim) each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, dim, generator=generator) for _ in range(3)]


def single_rows(x_1: torch.Tensor, context: torch.Tensor) -> fl.FlowRows:
    """Make rows of one tap and one context mode, where each target has its context."""
    n = len(x_1)
    exists = torch.ones(1, 1, n, dtype=torch.bool)
    return fl.FlowRows(x_1, context, torch.zeros(1), exists)


def random_flow(config: fl.FlowConfig) -> fl.Flow:
    torch.manual_seed(0)
    flow = fl.Flow(config)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flow


def test_velocity_error_of_a_linear_field():
    x_1, x_0, context = random_vectors(6)
    t = torch.full((6,), 0.3)
    v = 0.5 * (0.3 * x_1 + 0.7 * x_0) - 0.25 * context
    expected = (v - (x_1 - x_0)).square().mean(dim=1)
    got = fl.velocity_error(LinearField(), x_1, context, torch.zeros(6), x_0, t)
    torch.testing.assert_close(got, expected)


def test_the_best_field_of_one_point_has_no_error():
    """The field of the path that ends at x_1 is (x_1 - x_t)/(1 - t)."""
    x_1, x_0, _ = random_vectors(6)

    def straight(x_t, t, context, depth):
        return (x_1 - x_t) / (1 - t[:, None])

    t = torch.full((6,), 0.8)
    error = fl.velocity_error(straight, x_1, x_1, torch.zeros(6), x_0, t)
    assert error.max() < 1e-10


def test_each_time_has_its_own_weight():
    """Regression: the official code gives every time the weight of the last, 4 for 0.8.

    By hand 0.5*(1*2 + 4*3) = 7.
    """
    errors = torch.tensor([[2.0], [3.0]])
    assert fl.deviation_score(errors, [0.5, 0.8]).item() == pytest.approx(7.0)
    assert fl.deviation_score(errors.flip(0), [0.8, 0.5]).item() == pytest.approx(7.0)


def test_contexts_stay_inside_the_row():
    latents = torch.arange(8.0).view(2, 4, 1)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    context, exists = fl.CONTEXTS["previous"](latents, mask, 1)
    assert exists.tolist() == [[False, True, True, False], [False, True, True, True]]
    assert context[exists].flatten().tolist() == [0, 1, 4, 5, 6]
    context, exists = fl.CONTEXTS["next"](latents, mask, 1)
    assert exists.tolist() == [[True, True, False, False], [True, True, True, False]]
    assert context[exists].flatten().tolist() == [1, 2, 5, 6, 7]
    context, exists = fl.CONTEXTS["previous"](latents, mask, 9)
    assert not exists.any()
    context, exists = fl.CONTEXTS["self"](latents, mask, 1)
    assert (exists == mask).all() and (context == latents).all()


def test_modes_layers_and_targets_are_averaged():
    """Two taps, two modes: a target's score is the mean of its rows; a missing one counts 0."""
    latents = [torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[[3.0], [3.0], [3.0]]])]
    everything = torch.ones(1, 3, dtype=torch.bool)
    config = fl.FlowConfig(dim=1, contexts=("previous", "next"), percentiles=(0.25, 0.5))
    rows = fl.make_rows(config, latents, [0.25, 0.5], everything, everything)
    assert rows.exists.shape == (2, 2, 3)
    assert rows.depth.tolist() == [0.25, 0.5]
    assert rows.taps().tolist() == [0] * 4 + [1] * 4
    assert rows.context.flatten().tolist() == [1, 2, 2, 4, 3, 3, 3, 3]

    def no_velocity(x_t, t, context, depth):
        return x_t * 0

    # v = 0 and x_0 = 0: delta = x_1^2, and the weight of 0.5 is 1
    score, _ = score_and_learn(no_velocity, rows, torch.zeros(2, 2, 3, 1), [0.5])
    assert score.tolist() == pytest.approx([(1 + 9) / 4, (4 + 4 + 9 + 9) / 4, (16 + 9) / 4])


def test_score_and_loss_share_a_forward_and_its_gradient():
    x_1, x_0, context = random_vectors(5)
    field = LinearField()
    calls = []
    field.register_forward_hook(lambda *_: calls.append(1))
    rows = single_rows(x_1, context)
    weight = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    score, loss = score_and_learn(field, rows, x_0[None, None], [0.5, 0.8], weight)
    assert len(calls) == 2, "one forward a time serves score and loss"
    got = [p.grad.clone() for p in field.parameters()]
    field.zero_grad()
    arguments = (field, x_1, context, torch.zeros(5), x_0)
    early = fl.velocity_error(*arguments, torch.full((5,), 0.5))
    late = fl.velocity_error(*arguments, torch.full((5,), 0.8))
    errors = torch.stack([early, late])
    (weight * errors.mean(dim=0)).sum().backward()
    torch.testing.assert_close(got, [p.grad for p in field.parameters()])
    torch.testing.assert_close(loss, errors.mean(dim=0).detach())
    torch.testing.assert_close(score, fl.deviation_score(errors, [0.5, 0.8]).detach())


def test_learning_at_random_times_leaves_the_score_alone():
    x_1, x_0, context = random_vectors(5)
    rows = single_rows(x_1, context)
    weight = torch.ones(5)
    z = torch.linspace(-2, 2, 5)
    fixed = LinearField()
    score, _ = score_and_learn(fixed, rows, x_0[None, None], [0.8], weight)
    random = LinearField()
    score_random, loss = score_and_learn(
        random, rows, x_0[None, None], [0.8], weight, z.sigmoid()[None, None]
    )
    torch.testing.assert_close(score, score_random)
    expected = fl.velocity_error(random, x_1, context, torch.zeros(5), x_0, z.sigmoid())
    torch.testing.assert_close(loss, expected.detach())
    assert random.a.grad != fixed.a.grad


def test_chunks_of_rows_change_nothing(monkeypatch):
    x_1, x_0, context = random_vectors(7)
    rows = single_rows(x_1, context)
    weight = torch.tensor([1.0, 0, 2, 0, 0, 3, 1])
    results = []
    for size in (100, 3):
        monkeypatch.setattr(fl, "ROWS_PER_CALL", size)
        field = LinearField()
        score, loss = score_and_learn(field, rows, x_0[None, None], [0.8], weight)
        offline = fl.matching_loss(field, rows, x_0[None, None], torch.full((1, 1, 7), 0.5))
        results.append((score, loss, offline, field.a.grad, field.b.grad))
    torch.testing.assert_close(*results)


def test_a_time_and_a_depth_of_all_rows_can_be_given_once():
    flow = random_flow(fl.FlowConfig(dim=8))
    x_1, _, context = random_vectors(5, 8)
    once = flow(x_1, torch.tensor([0.8]), context, torch.tensor([0.25]))
    each = flow(x_1, torch.full((5,), 0.8), context, torch.full((5,), 0.25))
    torch.testing.assert_close(once, each)


def test_rows_of_a_tap_are_called_together(monkeypatch):
    """Three taps of 4 rows, 3 at most in a call, and of the second tap none is chosen."""
    monkeypatch.setattr(fl, "ROWS_PER_CALL", 3)
    exists = torch.ones(3, 1, 4, dtype=torch.bool)
    x_1 = torch.arange(12.0)[:, None]
    rows = fl.FlowRows(x_1, -x_1, torch.tensor([0.25, 0.5, 0.75]), exists)
    chosen = torch.tensor([1] * 4 + [0] * 4 + [0, 1, 1, 0], dtype=torch.bool)
    calls = []
    for called, (x_1_of_call, context, depth) in rows.calls(chosen):
        assert x_1_of_call[:, 0].tolist() == called.tolist() == (-context[:, 0]).tolist()
        calls.append((called.tolist(), depth.tolist()))
    assert calls == [([0, 1, 2], [0.25]), ([3], [0.25]), ([9, 10], [0.75])]


def test_the_score_is_a_small_part_of_a_step():
    """Multiplications at 7B shapes: 3 taps, 6 blocks; a token is scored and updated by the policy."""
    with torch.device("meta"):
        flow = fl.Flow(fl.FlowConfig(dim=3584, n_blocks=6))
        rows = torch.zeros(8192, 3584)
        scalar = torch.zeros(1)
    with FlopCounterMode(display=False) as counter:
        flow(rows, scalar, rows, scalar)
    per_token = 3 * counter.get_total_flops() / len(rows)
    policy = 2 * 7.6e9  # a multiplication and an addition a parameter
    without_gradient, forward_and_backward = policy, 3 * policy
    share = per_token / (without_gradient + forward_and_backward)
    assert 0.03 < share < 0.08


def test_noise_depends_on_the_key_alone():
    config = fl.FlowConfig(dim=5, contexts=("previous", "self"), percentiles=(0.25, 0.5, 0.75))
    together, z = fl.draw(config, [("n", 0, 3, 0), ("n", 0, 3, 1)], [4, 2], CPU)
    alone, z_alone = fl.draw(config, [("n", 0, 3, 1)], [2], CPU)
    assert together.shape == (3, 2, 6, 5) and z.shape == (3, 2, 6)
    assert torch.equal(together[:, :, 4:], alone) and torch.equal(z[:, :, 4:], z_alone)
    other, _ = fl.draw(config, [("n", 0, 4, 1)], [2], CPU)
    assert not torch.equal(other, alone)


def test_a_new_network_predicts_no_velocity():
    flow = fl.Flow(fl.FlowConfig(dim=8))
    assert flow(torch.randn(3, 8), torch.rand(3), torch.randn(3, 8), torch.rand(3)).abs().max() == 0


def test_all_layers_but_modulations_and_output_start_as_xaviers():
    """As officially; the embeddings of time and depth, too."""
    torch.manual_seed(0)
    flow = fl.Flow(fl.FlowConfig(dim=48, n_blocks=1))
    bounds = {}
    for name, parameter in flow.named_parameters():
        if parameter.ndim == 2 and parameter.any():
            bounds[name] = parameter.abs().max().item() / (6 / sum(parameter.shape)) ** 0.5
    assert sum("embed.mlp" in name for name in bounds) == 4
    for name, bound in bounds.items():
        assert 0.97 < bound <= 1, name


def test_norms_have_the_policys_eps(tmp_path):
    config = fl.FlowConfig(dim=8, n_blocks=2, norm_eps=1e-5)
    flow = random_flow(config)
    norms = [module for module in flow.modules() if isinstance(module, torch.nn.RMSNorm)]
    assert [norm.eps for norm in norms] == [1e-5] * 3
    fl.save_flow(config, flow.state_dict(), tmp_path)
    assert fl.load_flow(tmp_path, 8).config.norm_eps == 1e-5
    values = {name: value for name, value in asdict(config).items() if name != "norm_eps"}
    save_file(flow.state_dict(), tmp_path / "flow.safetensors", {"config": json.dumps(values)})
    assert fl.load_flow(tmp_path, 8, 1e-5).config.norm_eps == 1e-6, "as when it was written"
    (tmp_path / "flow.safetensors").unlink()
    torch.save(flow.state_dict(), tmp_path / "flow_model.bin")
    assert fl.load_flow(tmp_path, 8, 1e-5, contexts=("next",)).config.norm_eps == 1e-5


def test_saved_flow_comes_back(tmp_path):
    config = fl.FlowConfig(
        dim=8, n_blocks=2, width=12, contexts=("next", "self"), shift=2, percentiles=(0.1, 0.9)
    )
    flow = random_flow(config)
    fl.save_flow(config, flow.state_dict(), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["flow.safetensors"]
    loaded = fl.load_flow(tmp_path, 8)
    assert loaded.config == config
    torch.testing.assert_close(loaded.state_dict(), flow.state_dict(), rtol=0, atol=0)


def test_official_checkpoint_loads(tmp_path):
    flow = random_flow(fl.FlowConfig(dim=8, n_blocks=3))
    torch.save(flow.state_dict(), tmp_path / "flow_model.bin")
    loaded = fl.load_flow(tmp_path, 8, contexts=("next",))
    assert loaded.config == fl.FlowConfig(dim=8, n_blocks=3, width=8, contexts=("next",))
    arguments = torch.randn(3, 8), torch.rand(3), torch.randn(3, 8), torch.rand(3)
    torch.testing.assert_close(loaded(*arguments), flow(*arguments))


@pytest.mark.parametrize(
    ("expected", "words"),
    [
        ({"dim": 16}, ["dim=8", "(8, 8)", "expected dim=16"]),
        ({"dim": 8, "n_blocks": 6}, ["n_blocks=2", "2 blocks", "expected n_blocks=6"]),
    ],
)
def test_flow_that_does_not_fit(tmp_path, expected, words):
    config = fl.FlowConfig(dim=8, n_blocks=2)
    fl.save_flow(config, random_flow(config).state_dict(), tmp_path)
    with pytest.raises(ValueError) as error:
        fl.load_flow(tmp_path, **expected)
    for word in words:
        assert word in str(error.value)


def test_a_flow_scores_with_other_contexts_on_request(tmp_path, capsys):
    """Its calibration does not hold for them."""
    config = fl.FlowConfig(dim=8, n_blocks=2, calibrated_at=(0.5,))
    fl.save_flow(config, random_flow(config).state_dict(), tmp_path)
    same = fl.load_flow(tmp_path, 8, contexts=("previous",))
    assert same.config == config and not capsys.readouterr().out
    other = fl.load_flow(tmp_path, 8, contexts=("next", "self"))
    assert other.config.contexts == ("next", "self")
    assert "was fitted with contexts ('previous',)" in capsys.readouterr().out
    torch.testing.assert_close(other.model.state_dict(), same.model.state_dict())
    with pytest.raises(ValueError, match="calibrated at the times"):
        other.expert_scale([0.5])


def test_broken_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="no flow at .*train_flow.py"):
        fl.load_flow(tmp_path / "nothing", 8)
    state = random_flow(fl.FlowConfig(dim=8, n_blocks=2)).state_dict()
    file = tmp_path / "flow_model.bin"
    torch.save(state, file)
    with pytest.raises(ValueError, match="--contexts"):
        fl.load_flow(file, 8)
    torch.save({k: v for k, v in state.items() if "time_embed.mlp.0" not in k}, file)
    words = "(?s)cut, or of another network.*Missing key.*model.time_embed.mlp.0.bias"
    with pytest.raises(ValueError, match=words):
        fl.load_flow(file, 8, contexts=("next",))
    torch.save(state | {"model.gate.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="(?s)Unexpected key.*model.gate.weight"):
        fl.load_flow(file, 8, contexts=("next",))
    torch.save(state | {"model.final_layer.linear.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"(?s)linear.bias.*\[3\].*\[8\]"):
        fl.load_flow(file, 8, contexts=("next",))


def test_files_that_are_no_flows(tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "flow_model.bin")
    with pytest.raises(ValueError, match="no official flow.*model.input_proj.weight.*'weight'"):
        fl.load_flow(tmp_path, 8, contexts=("next",))
    save_file({"weight": torch.zeros(1)}, tmp_path / "flow.safetensors")
    with pytest.raises(ValueError, match="no configuration; expected a file written by"):
        fl.load_flow(tmp_path, 8)


def test_official_checkpoint_runs_no_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"model.input_proj.weight": Evil()}, tmp_path / "flow_model.bin")
    with pytest.raises(Exception, match="[Ww]eights"):
        fl.load_flow(tmp_path, 8, contexts=("next",))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"contexts": ("middle",)}, "contexts=.*expected one or more of previous, next, self"),
        ({"percentiles": (0.5, 1.5)}, r"percentiles=\(0.5, 1.5\): expected fractions .* \[0, 1\]"),
        ({"percentiles": (-0.1,)}, r"percentiles=\(-0.1,\)"),
        ({"n_blocks": 0}, "n_blocks=0.*at least 1"),
    ],
)
def test_settings_of_a_flow(settings, words):
    with pytest.raises(ValueError, match=words):
        fl.FlowConfig(dim=8, **settings)


@pytest.mark.parametrize("times", [(1.0,), (0.8, 1.0), (0.0,), (1.2,), ()])
def test_reward_times(times):
    words = r"in \(0, 1\), e.g. 0.8; the weight t/\(1-t\) of 1 is infinite"
    with pytest.raises(ValueError, match=words):
        fl.check_times(times)


def test_random_and_uniform_times():
    quantiles = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    z = torch.special.ndtri(quantiles)
    torch.testing.assert_close(fl.draw_times(z, "uniform"), quantiles)
    torch.testing.assert_close(fl.draw_times(z, "random"), 1 / (1 + (-z).exp()))
