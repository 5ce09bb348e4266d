"""The algorithm: taps and log-probs on several families, shaping, advantages, losses; hand-computed numbers."""

import math

import pytest
import torch
import transformers as hf

import flow as fl
import parallel
import rlfr

TINY = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
)
FAMILIES = {
    "qwen2": hf.Qwen2Config(**TINY),
    "qwen3": hf.Qwen3Config(**TINY, head_dim=8),
    "llama": hf.LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": hf.MistralConfig(**TINY, sliding_window=None),
    "gemma": hf.GemmaConfig(**TINY, head_dim=8),
    "gemma2": hf.Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=2.0),
    "gemma3": hf.Gemma3TextConfig(**TINY, head_dim=8),
}
EPISODES = [
    ([5, 6, 7], [8, 9]),
    ([10], [11, 12, 13, 14, 15]),
    ([20, 21, 22, 23, 24, 25], [26, 27, 28]),
    ([30, 31], [32]),
]


def tiny(family: str) -> rlfr.Policy:
    torch.manual_seed(0)
    return rlfr.Policy(hf.AutoModelForCausalLM.from_config(FAMILIES[family]).train())


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_gives_what_hugging_face_gives(family):
    policy, taps = tiny(family), [1, 2, 3]
    batch = rlfr.collate(EPISODES)
    logp, entropy, latents = policy(batch, temperature=0.7, taps=taps)
    for row, (prompt, response) in enumerate(
        EPISODES
    ):  # each alone, without padding, from full logits
        ids = torch.tensor([prompt + response])
        output = policy.model(ids, output_hidden_states=True)
        z = (output.logits[0, len(prompt) - 1 : -1].float() / 0.7).log_softmax(dim=-1)
        n = len(response)
        torch.testing.assert_close(
            logp[row, :n],
            z.gather(1, torch.tensor(response)[:, None]).squeeze(1),
            rtol=1e-4,
            atol=1e-5,
        )
        torch.testing.assert_close(
            entropy[row, :n], -(z.exp() * z).sum(dim=1), rtol=1e-4, atol=1e-5
        )
        assert (logp[row, n:] == 0).all()
        for tap, latent in zip(taps, latents, strict=True):
            if tap + 1 < 4:  # Hugging Face norms the last entry of hidden_states
                expected = output.hidden_states[tap + 1][0]
                torch.testing.assert_close(
                    latent[row, : ids.shape[1]], expected, rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("family", FAMILIES)
def test_early_exit_gives_the_same_latents_and_runs_nothing_above(family):
    policy, taps = tiny(family), [1, 2]
    batch, ran = rlfr.collate(EPISODES), []
    layers = policy.model.get_decoder().layers
    layers[3].register_forward_hook(lambda *_: ran.append(3))
    full = policy(batch, taps=taps).latents
    assert ran == [3]
    short = policy(batch, taps=taps, latents_only=True)
    assert ran == [3] and short.logp is None
    assert all(torch.equal(a, b) for a, b in zip(full, short.latents, strict=True))
    assert all(len(layer._forward_hooks) == (index == 3) for index, layer in enumerate(layers)), (
        "hooks are gone"
    )


def test_taps_may_coincide():
    latents = tiny("qwen2")(rlfr.collate(EPISODES), taps=[1, 1, 3]).latents
    assert len(latents) == 3 and torch.equal(latents[0], latents[1])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probs_and_their_gradient_without_logits(softcap, monkeypatch):
    monkeypatch.setattr(rlfr, "CHUNK_LOGITS", 13 * 3)  # chunks of 3 rows
    torch.manual_seed(0)
    hidden, weight = torch.randn(8, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True)
    targets, g_logp, g_entropy = torch.randint(13, (8,)), torch.randn(8), torch.randn(8)
    z = hidden @ weight.T
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.7
    log_p = z.log_softmax(dim=-1)
    expected = log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(dim=1)
    got = rlfr.TokenLogProbs.apply(hidden, weight, targets, 0.7, softcap)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad((g_logp * a + g_entropy * b).sum(), (hidden, weight))
        for a, b in (got, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_no_logits_of_the_whole_batch_are_made():
    """The largest tensor that scoring makes stays below rows x vocabulary."""
    config = hf.Qwen2Config(**{**TINY, "vocab_size": 20_000})
    policy = rlfr.Policy(hf.AutoModelForCausalLM.from_config(config))
    batch = rlfr.collate([([1, 2], list(range(3, 203)))] * 20)  # 4,000 response tokens: 80 M logits
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(
                [
                    largest,
                    *(
                        x.numel()
                        for x in torch.utils._pytree.tree_leaves(out)
                        if isinstance(x, torch.Tensor)
                    ),
                ]
            )
            return out

    with Watch():
        policy(batch).logp.sum().backward()
    assert largest <= rlfr.CHUNK_LOGITS < 4000 * 20_000


def test_scaled_or_biased_heads_are_refused():
    model = hf.AutoModelForCausalLM.from_config(hf.Qwen2Config(**TINY))
    model.lm_head = torch.nn.Linear(32, 96, bias=True)
    with pytest.raises(ValueError, match="a bias on its logits; expected a plain linear head"):
        rlfr.Policy(model)


def test_scores_do_not_depend_on_micro_batches(policy, flow_folder):
    """Micro-batches of 1, 3 and 8, and other padding: log-probs and flow scores agree to 1e-5."""
    flow = fl.load_flow(flow_folder, 32)
    generator = torch.Generator().manual_seed(0)
    episodes = [
        (
            torch.randint(200, (3 + i,), generator=generator).tolist(),
            torch.randint(200, (2 + 3 * i,), generator=generator).tolist(),
        )
        for i in range(8)
    ]
    taps = rlfr.tap_layers(policy.n_layers, flow.config.percentiles)
    depths = [tap / policy.n_layers for tap in taps]

    def scores(groups):
        found = {}
        for group in groups:
            batch = rlfr.collate([episodes[i] for i in group])
            logp, _, latents = policy(batch, 0.9, taps)
            pairs = fl.pair(flow.config, latents, depths, batch.attention_mask, batch.targets)
            noise, _ = fl.draw(
                flow.config,
                [("noise", 0, 0, i) for i in group],
                batch.response_mask.sum(dim=1).tolist(),
            )
            score, _ = fl.score_and_learn(flow, pairs, noise, [0.5, 0.8])
            reward = rlfr.select(rlfr.normalise(batch.unflatten(score), batch.response_mask))
            for row, i in enumerate(group):
                n = len(episodes[i][1])
                found[i] = torch.stack(
                    [logp[row, :n], batch.unflatten(score)[row, :n], reward[row, :n]]
                ).detach()
        return [found[i] for i in range(8)]

    alone = scores([[i] for i in range(8)])
    assert max(part[2].max() for part in alone) > 0.6
    for groups in (
        [[0, 3, 6], [1, 4, 7], [2, 5]],
        [list(range(8))],
        [[7, 0, 1], [6, 2, 3], [5, 4]],
    ):
        torch.testing.assert_close(scores(groups), alone, rtol=1e-5, atol=1e-5)


def test_micro_batches_keep_to_the_budget():
    pairs = [([1] * a, [2] * b) for a, b in ((3, 4), (1, 1), (5, 5), (2, 1), (9, 30))]
    seen = []
    for rows, batch in rlfr.micro_batches(pairs, 20):
        seen += rows
        assert len(rows) == 1 or batch.input_ids.numel() <= 20
        assert batch.targets.sum() == sum(len(pairs[i][1]) for i in rows)
    assert sorted(seen) == list(range(5))


# ---- Flow reward

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
SCORE = torch.tensor(
    [[1.0, 2.0, 3.0, 5.0], [4.0, 2.0, 9.0, 9.0], [2.0, 2.0, 2.0, 0.0], [7.0, 7.0, 7.0, 7.0]]
)


def test_normalise_by_hand():
    """Regressions: full rows start at their minimum, constant and empty rows are 0, never NaN or negative."""
    expected = torch.tensor([[0.0, 0.25, 0.5, 1.0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(rlfr.normalise(SCORE, MASK), expected)
    torch.testing.assert_close(rlfr.normalise(SCORE, MASK, power=2.0), expected**2)
    bilateral = torch.tensor([[-1.0, -0.5, 0.0, 1.0], [1, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(rlfr.normalise(SCORE, MASK, bilateral=True), bilateral)


def test_group_scope_keeps_what_tells_responses_apart():
    got = rlfr.normalise(SCORE[:2], MASK[:2], group_size=2)
    torch.testing.assert_close(got, torch.tensor([[0, 0.25, 0.5, 1.0], [0.75, 0.25, 0, 0]]))


def test_select_by_hand():
    s = torch.tensor([[0.1, 0.7, 0.9, 0.61, 0.6]])
    assert rlfr.select(s, 0.6, None).tolist() == [pytest.approx([0, 0.7, 0.9, 0.61, 0])]
    assert rlfr.select(s, 0.6, 2).tolist() == [pytest.approx([0, 0.7, 0.9, 0, 0])]
    assert rlfr.select(s, 0.0, 1).tolist() == [pytest.approx([0, 0, 0.9, 0, 0])]
    assert rlfr.select(s, 0.0, None).equal(s) and rlfr.select(s * 0, 0.6, 2).equal(s * 0)
    b = torch.tensor([[-0.9, 0.7, 0.9, -0.7, 0.1, 0.8]])
    assert rlfr.select(b, 0.6, None, bilateral=True).tolist() == [
        pytest.approx([-0.9, 0.7, 0.9, -0.7, 0, 0.8])
    ]
    assert rlfr.select(b, 0.6, 2, bilateral=True).tolist() == [
        pytest.approx([-0.9, 0, 0.9, 0, 0, 0])
    ]


# ---- Advantages


def test_outcome_advantages_by_hand():
    reward = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5])
    std = math.sqrt(1 / 3)
    assert rlfr.outcome_advantage(reward, 4).tolist() == pytest.approx(
        [0.5 / std, -0.5 / std, -0.5 / std, 0.5 / std] + [0] * 4
    )
    assert rlfr.outcome_advantage(reward, 4, "rloo").tolist() == pytest.approx(
        [2 / 3, -2 / 3, -2 / 3, 2 / 3] + [0] * 4
    )
    for baseline in ("dr_grpo", "reinforce++"):
        assert (
            rlfr.outcome_advantage(reward, 4, baseline).tolist() == [0.5, -0.5, -0.5, 0.5] + [0] * 4
        )
    assert rlfr.outcome_advantage(reward, 4, "reinforce").equal(reward)


def test_equal_rewards_have_no_advantage():
    """Regression: 8 rewards of 0.7 have a mean that rounds off; divided by a rounded std the official code gives -0.83."""
    for value in (0.7, 0.1, 1 / 3):
        for baseline in ("grpo", "rloo", "dr_grpo"):
            assert rlfr.outcome_advantage(torch.full((24,), value), 8, baseline).abs().max() == 0
    assert rlfr.varied_groups(torch.tensor([0.7, 0.7, 0.7, 0.1]), 2).tolist() == [False, True]


def test_token_returns_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 100.0]])
    assert rlfr.token_returns(reward, mask).tolist() == [[7, 6, 4], [3, 2, 0]]
    assert rlfr.token_returns(reward, mask, 0.5).tolist() == [[3, 4, 4], [2, 2, 0]]


def test_entropy_advantage_by_hand():
    advantage, entropy = (
        torch.tensor([[1.0, -1.0, 0.0]]),
        torch.tensor([[0.5, 9.0, 9.0]], requires_grad=True),
    )
    got = rlfr.entropy_advantage(advantage, entropy)
    assert got.tolist() == [pytest.approx([1.2, -0.5, 0.0])] and not got.requires_grad


def test_whiten():
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    got = rlfr.whiten(torch.tensor([[1.0, 2.0], [3.0, 99.0]]), mask)
    torch.testing.assert_close(got, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


# ---- Losses


def test_policy_loss_by_hand():
    old = torch.zeros(1, 5)
    ratio = torch.tensor([[1.1, 1.5, 0.5, 0.5, 9.0]])
    advantage = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0]])
    loss, clipped = rlfr.policy_loss(ratio.log(), old, advantage)
    assert loss.tolist() == [pytest.approx([-1.1, -1.2, -0.5, 0.8, 3.0])]
    assert clipped.tolist() == [[False, True, False, True, False]]
    assert rlfr.policy_loss(ratio.log(), old, advantage, clip_high=0.28)[0][
        0, 1
    ].item() == pytest.approx(-1.28)


def test_token_weights_do_not_depend_on_micro_batches():
    """Regression: a mean of micro-batch means weights episodes unevenly; here the denominator is the mini-batch's."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    loss = torch.tensor([[1.0, 2, 3, 4], [10, 0, 0, 0], [5, 7, 0, 0]])
    for kind, expected in {
        "sequence": (2.5 + 10 + 6) / 3,
        "token": 32 / 7,
        "constant": 32 / (3 * 6),
    }.items():
        whole = (loss * rlfr.token_weights(mask, kind, 3, 7, 6)).sum()
        parts = sum(
            (loss[rows] * rlfr.token_weights(mask[rows], kind, 3, 7, 6)).sum()
            for rows in ([0, 1], [2])
        )
        assert whole.item() == pytest.approx(expected) and parts.item() == pytest.approx(expected)


def test_kl_by_hand():
    d = torch.tensor([0.5])
    for kind, expected in {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 0.5}.items():
        assert rlfr.kl_divergence(d, torch.zeros(1), kind).item() == pytest.approx(expected)


def test_importance_weights_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    sampled = torch.tensor([[0.0, 0.0, torch.nan], [0.0, 0.0, 0.0]])
    trained = torch.tensor([[math.log(4.0), math.log(0.75), 0.3], [math.log(1.5), 8.0, 8.0]])
    weights = {
        mode: rlfr.importance_weights(trained, sampled, mask, mode, cap=2.0)
        for mode in ("none", "token", "sequence", "mask")
    }
    assert weights["none"][0].tolist() == [[1, 1, 1], [1, 1, 1]]
    torch.testing.assert_close(weights["token"][0][mask], torch.tensor([2, 0.75, 1, 1.5]))
    torch.testing.assert_close(weights["sequence"][0][mask], torch.tensor([2, 2, 2, 1.5]))
    torch.testing.assert_close(weights["mask"][0][mask], torch.tensor([0, 0.75, 1, 1.5]))
    for _, figures in weights.values():  # of the raw ratios, whatever the mode
        assert figures["mismatch/ratio_max"] == pytest.approx(4) and figures[
            "mismatch/ratio_mean"
        ] == pytest.approx(7.25 / 4)
        assert figures["mismatch/over_cap"] == 0.25 and figures["mismatch/nan"] == 1


def test_online_flow_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    correct = torch.tensor([True, False])
    tokens, rows = rlfr.online_flow_weights(mask, correct, soft=0.25)
    assert rows.tolist() == [1, 0.25] and tokens.tolist() == [[0.25] * 4, [0.5, 0.5, 0, 0]]
    entropy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 50.0, 60.0]])
    tokens, rows = rlfr.online_flow_weights(mask, None, entropy, 0.5, soft=0.5)
    assert rows.tolist() == [1, 1]
    torch.testing.assert_close(
        tokens, torch.tensor([[1 / 6, 1 / 6, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 0, 0]])
    )
    # departure: padding does not move the quantile, so that the batch's width has no say
    wider = rlfr.online_flow_weights(
        torch.nn.functional.pad(mask, (0, 3)),
        None,
        torch.nn.functional.pad(entropy, (0, 3), value=99.0),
        0.5,
        0.5,
    )[0]
    torch.testing.assert_close(wider[:, :4], tokens)


# ---- Schedules


def test_learning_rate():
    rates = [rlfr.learning_rate(1.0, step, 100, 0.1, 0.1) for step in range(100)]
    assert (
        rates[0] == pytest.approx(0.1)
        and rates[9] == pytest.approx(1.0)
        and rates[10] == pytest.approx(1.0)
    )
    assert rates[-1] == pytest.approx(0.1, abs=1e-3) and all(
        a >= b for a, b in zip(rates[10:], rates[11:], strict=False)
    )


def test_a_gradient_that_is_not_finite_moves_nothing():
    module = torch.nn.Linear(3, 1, bias=False)
    learner, before = parallel.Learner(module, (0.9, 0.95), 0.0), module.weight.tolist()
    module.weight.grad = torch.tensor([[1.0, torch.nan, 0.0]])
    assert math.isnan(learner.step(1.0, 1.0))
    assert module.weight.tolist() == before and module.weight.grad is None
