"""The flow: analytic fields, context modes, weights of several times, keyed noise, files."""

import pytest
import torch

import flow as fl


class LinearField(torch.nn.Module):
    """v = a*x_t + b*context: its error at x_1, x_0, t is known in closed form."""

    def __init__(self, a=0.5, b=-0.25):
        super().__init__()
        self.a, self.b = torch.nn.Parameter(torch.tensor(a)), torch.nn.Parameter(torch.tensor(b))

    def forward(self, x_t, t, context, depth):
        return self.a * x_t + self.b * context


def rows(n=6, dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, dim, generator=generator) for _ in range(3)]


def random_flow(config: fl.FlowConfig) -> fl.Flow:
    torch.manual_seed(0)
    flow = fl.Flow(config)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return flow


def test_velocity_error_of_a_linear_field():
    x_1, x_0, context = rows()
    t = torch.full((6,), 0.3)
    expected = ((0.5 * (0.3 * x_1 + 0.7 * x_0) - 0.25 * context) - (x_1 - x_0)).square().mean(dim=1)
    got = fl.velocity_error(LinearField(), x_1, context, torch.zeros(6), x_0, t)
    torch.testing.assert_close(got, expected)


def test_the_best_field_of_one_point_has_no_error():
    x_1, x_0, _ = rows()

    def straight(
        x_t, t, context, depth
    ):  # the conditional field towards x_1 is (x_1 - x_t)/(1 - t)
        return (x_1 - x_t) / (1 - t[:, None])

    assert (
        fl.velocity_error(straight, x_1, x_1, torch.zeros(6), x_0, torch.full((6,), 0.8)).max()
        < 1e-10
    )


def test_each_time_has_its_own_weight():
    """Regression: the official code gives every time the weight of the last, 4 for 0.8; by hand 0.5*(1*2 + 4*3) = 7."""
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
    """Two taps, two modes: a target's score is the mean of its rows; a mode without a neighbour counts 0."""
    latents = [torch.tensor([[[1.0], [2.0], [4.0]]]), torch.tensor([[[3.0], [3.0], [3.0]]])]
    everything = torch.ones(1, 3, dtype=torch.bool)
    config = fl.FlowConfig(dim=1, contexts=("previous", "next"), percentiles=(0.25, 0.5))
    pairs = fl.pair(config, latents, [0.25, 0.5], everything, everything)
    assert pairs.exists.shape == (2, 2, 3) and pairs.depth.tolist() == [0.25] * 4 + [0.5] * 4
    assert pairs.context.flatten().tolist() == [1, 2, 2, 4, 3, 3, 3, 3]
    noise = torch.zeros(2, 2, 3, 1)
    # v = 0 and x_0 = 0: delta = x_1^2, and the weight of 0.5 is 1
    score, _ = fl.score_and_learn(lambda x_t, t, context, depth: x_t * 0, pairs, noise, [0.5])
    assert score.tolist() == pytest.approx([(1 + 9) / 4, (4 + 4 + 9 + 9) / 4, (16 + 9) / 4])


def test_score_and_loss_share_a_forward_and_its_gradient():
    x_1, x_0, context = rows(5)
    field, calls = LinearField(), []
    field.register_forward_hook(lambda *_: calls.append(1))
    pairs = fl.Pairs(x_1, context, torch.zeros(5), torch.ones(1, 1, 5, dtype=torch.bool))
    weight = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625])
    score, loss = fl.score_and_learn(field, pairs, x_0[None, None], [0.5, 0.8], weight)
    assert len(calls) == 2, "one forward a time serves score and loss"
    got = [p.grad.clone() for p in field.parameters()]
    field.zero_grad()
    errors = torch.stack(
        [
            fl.velocity_error(field, x_1, context, torch.zeros(5), x_0, torch.full((5,), t))
            for t in (0.5, 0.8)
        ]
    )
    (weight * errors.mean(dim=0)).sum().backward()
    torch.testing.assert_close(got, [p.grad for p in field.parameters()])
    torch.testing.assert_close(loss, errors.mean(dim=0).detach())
    torch.testing.assert_close(score, fl.deviation_score(errors, [0.5, 0.8]).detach())


def test_learning_at_random_times_leaves_the_score_alone():
    x_1, x_0, context = rows(5)
    pairs = fl.Pairs(x_1, context, torch.zeros(5), torch.ones(1, 1, 5, dtype=torch.bool))
    z = torch.linspace(-2, 2, 5)[None, None]
    fixed, random = LinearField(), LinearField()
    score, _ = fl.score_and_learn(fixed, pairs, x_0[None, None], [0.8], torch.ones(5))
    score_random, loss = fl.score_and_learn(random, pairs, x_0[None, None], [0.8], torch.ones(5), z)
    torch.testing.assert_close(score, score_random)
    expected = fl.velocity_error(
        random, x_1, context, torch.zeros(5), x_0, z.flatten().sigmoid()
    ).detach()
    torch.testing.assert_close(loss, expected)
    assert random.a.grad != fixed.a.grad


def test_chunks_of_rows_change_nothing(monkeypatch):
    x_1, x_0, context = rows(7)
    pairs = fl.Pairs(x_1, context, torch.zeros(7), torch.ones(1, 1, 7, dtype=torch.bool))
    results = []
    for size in (100, 3):
        monkeypatch.setattr(fl, "ROWS_PER_CALL", size)
        field = LinearField()
        weight = torch.tensor([1.0, 0, 2, 0, 0, 3, 1])
        score, loss = fl.score_and_learn(field, pairs, x_0[None, None], [0.8], weight)
        offline = fl.matching_loss(field, pairs, x_0[None, None], torch.zeros(1, 1, 7))
        results.append((score, loss, offline, field.a.grad, field.b.grad))
    torch.testing.assert_close(*results)


def test_noise_depends_on_the_key_alone():
    config = fl.FlowConfig(dim=5, contexts=("previous", "self"), percentiles=(0.25, 0.5, 0.75))
    together, z = fl.draw(config, [("n", 0, 3, 0), ("n", 0, 3, 1)], [4, 2])
    alone, z_alone = fl.draw(config, [("n", 0, 3, 1)], [2])
    assert together.shape == (3, 2, 6, 5) and z.shape == (3, 2, 6)
    assert torch.equal(together[:, :, 4:], alone) and torch.equal(z[:, :, 4:], z_alone)
    other, _ = fl.draw(config, [("n", 0, 4, 1)], [2])
    assert not torch.equal(other, alone)


def test_a_new_network_predicts_no_velocity():
    flow = fl.Flow(fl.FlowConfig(dim=8))
    assert flow(torch.randn(3, 8), torch.rand(3), torch.randn(3, 8), torch.rand(3)).abs().max() == 0


def test_saved_flow_comes_back(tmp_path):
    config = fl.FlowConfig(
        dim=8, n_blocks=2, width=12, contexts=("next", "self"), shift=2, percentiles=(0.1, 0.9)
    )
    flow = random_flow(config)
    fl.save_flow(flow, tmp_path)
    loaded = fl.load_flow(tmp_path, 8)
    assert loaded.config == config
    assert all(
        torch.equal(a, b)
        for a, b in zip(flow.state_dict().values(), loaded.state_dict().values(), strict=True)
    )
    assert [p.name for p in tmp_path.iterdir()] == ["flow.safetensors"]


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
        (
            {"dim": 8, "contexts": ("next",)},
            ["contexts=('previous',)", "expected contexts=('next',)"],
        ),
    ],
)
def test_flow_that_does_not_fit(tmp_path, expected, words):
    fl.save_flow(random_flow(fl.FlowConfig(dim=8, n_blocks=2)), tmp_path)
    with pytest.raises(ValueError) as error:
        fl.load_flow(tmp_path, **expected)
    assert all(word in str(error.value) for word in words), error.value


def test_broken_checkpoints(tmp_path):
    with pytest.raises(ValueError, match="no flow at .*train_flow.py"):
        fl.load_flow(tmp_path / "nothing", 8)
    state = random_flow(fl.FlowConfig(dim=8, n_blocks=2)).state_dict()
    file = tmp_path / "flow_model.bin"
    torch.save(state, file)
    with pytest.raises(ValueError, match="--contexts"):
        fl.load_flow(file, 8)
    torch.save({k: v for k, v in state.items() if "time_embed.mlp.0" not in k}, file)
    with pytest.raises(
        ValueError, match="(?s)cut, or of another network.*Missing key.*model.time_embed.mlp.0.bias"
    ):
        fl.load_flow(file, 8, contexts=("next",))
    torch.save(state | {"model.gate.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="(?s)Unexpected key.*model.gate.weight"):
        fl.load_flow(file, 8, contexts=("next",))
    torch.save(state | {"model.final_layer.linear.bias": torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r"(?s)linear.bias.*\[3\].*\[8\]"):
        fl.load_flow(file, 8, contexts=("next",))


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
    with pytest.raises(
        ValueError, match=r"in \(0, 1\), as 0.8; the weight t/\(1-t\) of 1 is infinite"
    ):
        fl.check_times(times)
