"""The algorithm: taps and log-probs on several families; shaping, advantages, losses by hand."""

import copy
import math
import random

import pytest
import torch
import transformers as hf
from conftest import FAMILIES, PLAIN_FAMILIES, TINY, plain_model, score_and_learn, tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import flow as fl
import rlfr
from infra import batching, families, memory, parallel
from infra.attention import attend
from infra.batching import group_order
from infra.logprobs import CHUNK_LOGITS, CHUNK_WORK, Scaling, TokenLogProbs
from policy import Policy, find_attention, load_policy, tap_layers

EPISODES = [
    batching.Row([5, 6, 7], [8, 9]),
    batching.Row([10], [11, 12, 13, 14, 15]),
    batching.Row([20, 21, 22, 23, 24, 25], [26, 27, 28]),
    batching.Row([30, 31], [32]),
]


def tiny_policy(family: str) -> Policy:
    return Policy(tiny_model(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_forward_gives_what_hugging_face_gives(family):
    """Each episode alone, without padding, from full logits; pytest -rP prints the largest error."""
    policy = tiny_policy(family)
    assert policy.packs == (family in PLAIN_FAMILIES)
    plain = plain_model(family)
    taps = [1, 2, 3]
    error = 0.0
    scored = policy(batching.collate(EPISODES), temperature=0.7, taps=taps)
    for row, (prompt, response, *_) in enumerate(EPISODES):
        n = len(response)
        ids = torch.tensor([prompt + response])
        output = plain(ids, output_hidden_states=True)
        logits = output.logits[0, len(prompt) - 1 : -1].float()
        log_p = (logits / 0.7).log_softmax(dim=-1)
        logp = log_p.gather(1, torch.tensor(response)[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        error = max(error, (scored.logp[row, :n] - logp).abs().max().item())
        torch.testing.assert_close(scored.logp[row, :n], logp, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scored.entropy[row, :n], entropy, rtol=1e-4, atol=1e-5)
        assert (scored.logp[row, n:] == 0).all()
        for tap, latent in zip(taps, scored.latents, strict=True):
            if tap + 1 < policy.n_layers:  # Hugging Face norms the last entry of hidden_states
                got = latent[row, : ids.shape[1]]
                expected = output.hidden_states[tap + 1][0]
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    print(f"{family:24} {'packed' if policy.packs else 'padded'} {error:.0e} latents equal")


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_needs_no_mask(family):
    """Hidden states of all tokens are those under the padding mask."""
    policy = tiny_policy(family)
    batch = batching.collate(EPISODES)
    is_token = batch.attention_mask
    states = policy.run_decoder(batch, batching.places_of(is_token))
    masked = plain_model(family).base_model(batch.input_ids, attention_mask=is_token)
    expected = masked.last_hidden_state[is_token]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_have_the_gradients_of_padded_ones(family):
    """Of a random combination of all tokens' states, for all parameters of the body."""
    policy = tiny_policy(family)
    plain = plain_model(family)
    batch = batching.collate(EPISODES)
    is_token = batch.attention_mask
    states = policy.run_decoder(batch, batching.places_of(is_token))
    masked = plain.base_model(batch.input_ids, attention_mask=is_token)
    weight = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states * weight).sum().backward()
    (masked.last_hidden_state[is_token] * weight).sum().backward()
    for got, expected in zip(
        policy.model.base_model.parameters(), plain.base_model.parameters(), strict=True
    ):
        difference = (got.grad - expected.grad).abs().max()
        assert difference <= 1e-5 * expected.grad.abs().max()


def test_packing_keeps_every_token():
    batch = batching.collate(EPISODES)
    packed = torch.arange(len(batch.packing.places))
    assert len(packed) == batch.attention_mask.sum()
    padded = batch.packing.pad(packed)
    assert torch.equal(batch.packing.pack(padded), packed)


PROMPTS_SHARED = [
    batching.Row([5, 6, 7], [8, 9]),
    batching.Row([10], [11, 12, 13]),
    batching.Row([5, 6, 7], [20, 21, 22, 23]),
    batching.Row([5, 6], [7, 8, 9]),  # begins like the first
    batching.Row([10], [14]),
    batching.Row([5, 6, 7], [8]),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_of_several_rows_is_computed_once(family):
    """Figures, latents and gradients are those of the rows one by one; packed, for fewer tokens."""
    policy = tiny_policy(family)
    alone = tiny_policy(family)
    seen = []
    policy.layers[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].shape[:2]))
    shared = policy(batching.collate(PROMPTS_SHARED), 0.7, taps=[1, 2])
    n_packed = 3 + 1 + 2 + 2 + 3 + 4 + 3 + 1 + 1
    assert seen == [(1, n_packed) if policy.packs else (6, 7)]
    (shared.logp.sum() + shared.entropy.square().sum()).backward()
    for i, row in enumerate(PROMPTS_SHARED):
        one = alone(batching.collate([row]), 0.7, taps=[1, 2])
        (one.logp.sum() + one.entropy.square().sum()).backward()
        n = len(row.response_ids)
        torch.testing.assert_close(shared.logp[i, :n], one.logp[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(shared.entropy[i, :n], one.entropy[0], rtol=1e-5, atol=1e-5)
        for latent, expected in zip(shared.latents, one.latents, strict=True):
            got = latent[i, : expected.shape[1]]
            assert (got - expected[0]).abs().max() <= 1e-5 * expected.abs().max()
    for got, expected in zip(policy.parameters(), alone.parameters(), strict=True):
        assert (got.grad - expected.grad).abs().max() <= 1e-4 * expected.grad.abs().max()


def plans_of(rows: list[batching.Row], token_budget: int, n_ranks: int) -> list[list[list[int]]]:
    """Return the indices in the micro-batches of every rank."""
    return [
        [indices for indices, _ in batching.micro_batches(rows, token_budget, rank, n_ranks)]
        for rank in range(n_ranks)
    ]


def test_rows_of_a_prompt_stand_side_by_side():
    """Each of four prompts has two rows, of 2, 3, 4 and 5 tokens; a rank gets two prompts."""
    rows = [batching.Row([n % 4 + 1], [2] * (n % 4 + 1)) for n in range(8)]
    line = batching.line_up(rows)
    assert [place.index for place in line] == [3, 7, 6, 2, 1, 5, 4, 0]
    assert [place.n_tokens for place in line] == [5, 5, 4, 4, 3, 3, 2, 2]
    assert [place.n_new for place in line] == [5, 4, 4, 3, 3, 2, 2, 1]
    assert plans_of(rows, 100, 2) == [[[3, 7, 6]], [[2, 1, 5, 4, 0]]]  # 13 and 12 tokens


@pytest.mark.parametrize(
    ("prompts", "n_ranks", "n_cut"),
    [
        ("aabbc", 1, 0),
        ("aabbcd", 2, 1),  # 8 + 9 tokens are better than 10 + 6
        ("aaaabbccdd", 5, 1),  # a problem that occurs twice in a step
        ("aabbccaa", 2, 0),
        ("aaaabbbbcccc", 2, 1),  # three groups for two ranks: one is cut
        ("abcd", 4, 0),
    ],
)
def test_prompts_are_shared_however_groups_fall(prompts, n_ranks, n_cut):
    """A prompt is computed again only where its rows are cut apart, at most at each cut."""
    rows = [batching.Row([ord(prompt)], [2, 2]) for prompt in prompts]
    plans = plans_of(rows, 100, n_ranks)
    assert sorted(index for plan in plans for part in plan for index in part) == [*range(len(rows))]
    n_prompts = sum(len({prompts[index] for index in part}) for plan in plans for part in plan)
    assert n_prompts == len(set(prompts)) + n_cut


def long_tailed_rows(seed: int, n_prompts: int) -> list[batching.Row]:
    """Return groups of eight responses whose lengths are log-normal: most short, a few very long."""
    generator = random.Random(seed)
    rows = []
    for prompt in range(n_prompts):
        level = generator.gauss(6.2, 0.35)  # of the problem
        for _ in range(8):
            length = int(generator.lognormvariate(level, 0.8))
            rows.append(batching.Row([prompt] * 120, [2] * length))
    return rows


def imbalance(rows: list[batching.Row], plans: list[list[list[int]]]) -> float:
    """Return the time of ranks that run in step, of what it were if all had the same work."""
    tokens = []
    for plan in plans:
        of_rank = []
        for part in plan:
            n_prompts = len({rows[index].prompt_ids[0] for index in part})
            n_response = sum(len(rows[index].response_ids) for index in part)
            of_rank.append(120 * n_prompts + n_response)
        tokens.append(of_rank)
    n_all = 120 * len({row.prompt_ids[0] for row in rows})
    n_all += sum(len(row.response_ids) for row in rows)
    return sum(map(max, zip(*tokens, strict=True))) * len(plans) / n_all


@pytest.mark.parametrize(("n_ranks", "limit"), [(2, 1.03), (8, 1.15)])
def test_work_is_evened_out_by_the_row(n_ranks, limit):
    """Regression: groups were dealt out as wholes: 1.04 on two ranks, 1.32 on eight."""
    found = []
    for seed in range(10):
        rows = long_tailed_rows(seed, n_prompts=16)
        found.append(imbalance(rows, plans_of(rows, 16_384, n_ranks)))
    assert sum(found) / len(found) < limit


@pytest.mark.parametrize("family", FAMILIES)
def test_a_policys_model_still_does_what_others_expect_of_it(family):
    """Rows that are not packed, with and without a mask of padding on the left."""
    model = tiny_policy(family).model
    plain = plain_model(family)
    ids = torch.arange(1, 13).view(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    got = model(ids, attention_mask=mask).logits[mask.bool()]
    expected = plain(ids, attention_mask=mask).logits[mask.bool()]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# ---- What a family needs is seen, not known
class LooksBack(torch.nn.Module):
    """A feed-forward that also gets the token before, which no configuration tells of."""

    def __init__(self, inner: torch.nn.Module, strength: float):
        super().__init__()
        self.inner = inner
        self.strength = torch.nn.Parameter(torch.tensor(strength))

    def forward(self, states):
        before = torch.nn.functional.pad(states, (0, 0, 1, -1))
        return self.inner(states + self.strength * before)


@pytest.mark.parametrize("strength", [1.0, 1e-2])
def test_a_layer_that_mixes_tokens_is_found_and_not_packed(strength):
    """One layer of four, and weights as small as those of a new model."""
    models = [tiny_model("llama", initializer_range=0.02) for _ in range(2)]
    for model in models:
        layer = model.model.layers[2]
        layer.mlp = LooksBack(layer.mlp, strength)
    policy = Policy(models[0])
    assert not policy.packs
    logp = policy(batching.collate(EPISODES)).logp
    for row, (prompt, response, *_) in enumerate(EPISODES):
        logits = models[1](torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(logp[row, : len(response)], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_5", "qwen3_next", "lfm2", "falcon_h1"])
def test_families_are_told_apart_by_small_weights_too(family):
    assert not Policy(tiny_model(family, initializer_range=0.02)).packs


def test_a_window_that_rows_of_a_check_would_not_fill_is_checked(monkeypatch):
    """A packed attention that forgets the window, for a family whose window is 4,096 tokens."""
    model = tiny_model("mistral")
    model.config.sliding_window = 4096
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 4096
    assert find_attention(model) == "packed"
    monkeypatch.setattr(
        "infra.attention.attend",
        lambda *inputs, **settings: attend(*inputs[:5], None, **settings),
    )
    assert find_attention(model) == "sdpa"
    assert model.config.sliding_window == 4096, "the model itself stays as it is"


@pytest.mark.parametrize(
    ("family", "n_layers"), [("llama", 1), ("gpt_oss", 2), ("lfm2", 3), ("gemma3", 6)]
)
def test_the_check_runs_the_first_layers_until_all_kinds_have_come(family, n_layers):
    model = tiny_model(family)
    n_before = len(model.model.layers)
    small = families.in_small(model, torch.device("cpu"))
    assert len(small.model.layers) == n_layers
    assert len(model.model.layers) == n_before


def test_a_large_model_costs_the_check_one_layer_and_few_words():
    model = tiny_model("llama", vocab_size=128_000).bfloat16()
    small = families.in_small(model, torch.device("cpu"))
    weights = list(small.parameters())
    assert {weight.dtype for weight in weights} == {torch.float32}
    assert sum(weight.numel() for weight in weights) < 4096 * 32 + 10_000
    assert Policy(model).packs
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert all(weight.requires_grad for weight in model.parameters())


def test_a_family_that_is_scored_otherwise_is_refused_when_it_is_loaded(tmp_path):
    """Falcon-H1 multiplies its logits by a number that is in its configuration alone."""
    tiny_model("falcon_h1", lm_head_multiplier=0.3).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="its log-probs differ by .*; expected a plain linear"
    ) as e:
        load_policy(str(tmp_path))
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_weights_that_say_nothing_and_weights_that_are_broken(value):
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.layers[0].mlp.down_proj.weight, value)
    torch.nn.init.constant_(model.model.norm.weight, value)
    if value == 0:
        assert Policy(model).packs
    else:
        with pytest.raises(ValueError, match="LlamaForCausalLM: its hidden states are not finite"):
            Policy(model)


def test_layers_that_cannot_be_tapped_are_refused():
    config = hf.GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match="GPT2LMHeadModel: its decoder has no list `layers`"):
        Policy(hf.AutoModelForCausalLM.from_config(config))


def test_padding_costs_the_decoder_nothing():
    """A decoder layer sees the 23 tokens of four rows, not their 36 positions."""
    policy = tiny_policy("qwen2")
    seen = []
    policy.layers[0].register_forward_hook(lambda _m, _i, output: seen.append(output.shape[:2]))
    batch = batching.collate(EPISODES)
    policy(batch)
    assert batch.input_ids.shape == (4, 9)
    assert seen == [(1, 23)]


@pytest.mark.parametrize("family", FAMILIES)
def test_early_exit_gives_the_same_latents_and_runs_nothing_above(family):
    policy = tiny_policy(family)
    batch = batching.collate(EPISODES)
    taps = [1, 2]
    ran = []
    policy.layers[3].register_forward_hook(lambda *_: ran.append(3))
    full = policy(batch, taps=taps).latents
    assert ran == [3]
    short = policy(batch, taps=taps, latents_only=True)
    assert ran == [3]
    assert short.logp is None
    torch.testing.assert_close(short.latents, full, rtol=0, atol=0)
    n_hooks = [len(layer._forward_hooks) for layer in policy.layers]
    assert n_hooks[:4] == [0, 0, 0, 1] and not any(n_hooks[4:]), "the taps' hooks are gone"


def test_compiled_parts_of_layers_give_the_same():
    """All layers share what is compiled of one; hooks on the layers go on working."""
    policy = tiny_policy("qwen2")
    batch = batching.collate(EPISODES)
    torch._dynamo.reset()  # what earlier tests compiled counts towards a limit
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        expected = policy(batch, taps=[1, 2])
        policy.compile_parts("on")
        got = policy(batch, taps=[1, 2])
        short = policy(batch, taps=[1, 2], latents_only=True)
    # attention, feed-forward, norm, a chunk of logits
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(short.latents, got.latents, rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_a_compiled_chunk_of_logits_gives_the_same(softcap):
    """Log-probs, entropies and both gradients; the code is the compiler's own, made for this machine."""
    torch.manual_seed(0)
    inputs = (torch.randn(8, 6, requires_grad=True), torch.randn(13, 6, requires_grad=True))
    targets = torch.randint(13, (8,))
    found = []
    for chunk_work in (CHUNK_WORK, [parallel.compiled(work, "on") for work in CHUNK_WORK]):
        scores = TokenLogProbs.apply(*inputs, targets, Scaling(0.7, softcap), chunk_work)
        gradients = torch.autograd.grad(scores, inputs, (torch.arange(8.0), torch.ones(8)))
        found.append((*scores, *gradients))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_no_step_of_a_micro_batch_waits_for_a_number(family):
    """Regression: on a GPU the host had to wait for what runs there, as often as a mask chose tokens.

    Tensors without numbers have none to wait for: there torch raises.
    """
    policy = tiny_policy(family)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tensors = vars(batching.collate(PROMPTS_SHARED))
    batch = batching.Batch(**tree_map_only(torch.Tensor, mode.from_tensor, tensors))
    with mode:
        output = policy(batch, 0.7, taps=[1])
        (output.logp + output.entropy).sum().backward()
    assert output.logp.shape == batch.response_mask.shape


def test_taps_may_coincide():
    latents = tiny_policy("qwen2")(batching.collate(EPISODES), taps=[1, 1, 3]).latents
    assert len(latents) == 3 and torch.equal(latents[0], latents[1])


@pytest.mark.parametrize("n_kept_chunks", [0, 2, 3])
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_log_probs_and_their_gradient_without_logits(softcap, n_kept_chunks, monkeypatch):
    """Also when the graph is kept for a second backward."""
    monkeypatch.setattr("infra.logprobs.CHUNK_LOGITS", 13 * 3)  # chunks of 3 rows
    monkeypatch.setattr("infra.logprobs.KEPT_LOGITS", 13 * 3 * n_kept_chunks)
    torch.manual_seed(0)
    hidden = torch.randn(8, 6, requires_grad=True)
    weight = torch.randn(13, 6, requires_grad=True)
    targets = torch.randint(13, (8,))
    g_logp = torch.randn(8)
    g_entropy = torch.randn(8)

    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / 0.7).log_softmax(dim=-1)
    logp = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(dim=1)
    got = TokenLogProbs.apply(hidden, weight, targets, Scaling(0.7, softcap))
    torch.testing.assert_close(got, (logp, entropy), rtol=1e-5, atol=1e-5)

    inputs = (hidden, weight)
    gradients = torch.autograd.grad((logp, entropy), inputs, (g_logp, g_entropy))
    for _ in range(2):
        got_gradients = torch.autograd.grad(got, inputs, (g_logp, g_entropy), retain_graph=True)
        torch.testing.assert_close(got_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_groups_stay_together_in_a_random_order():
    order = group_order(10, 4, "a", 1)  # the last group is short
    groups = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    starts = [order.index(group[0]) for group in groups]
    assert [
        order[start : start + len(g)] for start, g in zip(starts, groups, strict=True)
    ] == groups
    assert group_order(10, 4, "a", 1) == order
    orders = {tuple(group_order(40, 4, "a", step)) for step in range(9)}
    assert len(orders) == 9 and all(sorted(one) == list(range(40)) for one in orders)


@pytest.mark.parametrize(
    ("has_gradient", "n_ranks", "expected"),
    [
        ([0, 1, 0, 1], 1, [0, 1, 0, 1]),
        ([0, 0, 0, 0], 1, [1, 0, 0, 0]),  # a step is taken all the same
        ([1, 1, 1, 1], 2, [1, 1, 1, 1]),
        ([0, 0, 0, 1], 2, [1, 0, 0, 1]),  # another row, for the second rank
        ([0, 0, 1, 1, 1, 0], 3, [0, 0, 1, 1, 1, 0]),
        ([0, 1, 1, 1, 1, 0], 3, [1, 1, 1, 1, 1, 1]),
        ([0, 0, 0, 0], 2, [1, 1, 0, 0]),
    ],
)
def test_rows_without_a_gradient_are_left_out(has_gradient, n_ranks, expected):
    tokens = torch.zeros(len(has_gradient), 3, dtype=torch.bool)
    tokens[:, 1] = torch.tensor(has_gradient)
    rows = batching.rows_to_run(tokens, n_ranks)
    assert rows.tolist() == [bool(value) for value in expected]


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Keep the size of the largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.size = max(self.size, leaf.numel())
        return out


def test_no_logits_of_the_whole_batch_are_made():
    """The largest tensor that scoring makes stays below rows x vocabulary."""
    config = hf.Qwen2Config(**{**TINY, "vocab_size": 20_000})
    policy = Policy(hf.AutoModelForCausalLM.from_config(config))
    episode = batching.Row([1, 2], list(range(3, 203)))
    batch = batching.collate([episode] * 20)  # 4,000 response tokens: 80 M logits
    with LargestTensor() as largest:
        policy(batch).logp.sum().backward()
    assert largest.size <= CHUNK_LOGITS < 4000 * 20_000


def test_scaled_or_biased_heads_are_refused():
    model = hf.AutoModelForCausalLM.from_config(hf.Qwen2Config(**TINY))
    model.lm_head = torch.nn.Linear(32, 96, bias=True)
    with pytest.raises(ValueError, match="a bias on its logits; expected a plain linear head"):
        Policy(model)


def test_scores_do_not_depend_on_micro_batches(policy, flow_folder):
    """Micro-batches of 1, 3 and 8, and other padding: log-probs and flow scores agree to 1e-5."""
    flow = fl.load_flow(flow_folder, 32)
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for i in range(8):
        prompt = torch.randint(200, (3 + i,), generator=generator).tolist()
        response = torch.randint(200, (2 + 3 * i,), generator=generator).tolist()
        episodes.append(batching.Row(prompt, response))
    taps = tap_layers(policy.n_layers, flow.config.percentiles)
    depths = [tap / policy.n_layers for tap in taps]

    def score(group: list[int]) -> dict[int, torch.Tensor]:
        """Return log-probs, flow scores and flow rewards (3, tokens) of each episode."""
        batch = batching.collate([episodes[i] for i in group])
        logp, _, latents = policy(batch, 0.9, taps)
        rows = fl.make_rows(flow.config, latents, depths, batch.attention_mask, batch.targets)
        keys = [("noise", 0, 0, i) for i in group]
        lengths = [len(episodes[i].response_ids) for i in group]
        noise, _ = fl.draw(flow.config, keys, lengths, parallel.DEVICE)
        target_score, _ = score_and_learn(flow, rows, noise, [0.5, 0.8])
        flow_score = batch.unflatten(target_score)
        unit = rlfr.normalise(flow_score, batch.response_mask, bilateral=False, rows_together=1)
        reward = rlfr.select(unit, threshold=0.6, top_k=15, bilateral=False)
        figures = torch.stack([logp, flow_score, reward]).detach()  # (3, B, T)
        return {i: figures[:, row, : lengths[row]] for row, i in enumerate(group)}

    alone = {}
    for i in range(8):
        alone.update(score([i]))
    assert max(figures[2].max() for figures in alone.values()) > 0.6
    partitions = [
        [[0, 3, 6], [1, 4, 7], [2, 5]],
        [[0, 1, 2, 3, 4, 5, 6, 7]],
        [[7, 0, 1], [6, 2, 3], [5, 4]],
    ]
    for partition in partitions:
        together = {}
        for group in partition:
            together.update(score(group))
        torch.testing.assert_close(dict(sorted(together.items())), alone, rtol=1e-5, atol=1e-5)


def test_micro_batches_keep_to_the_budget():
    lengths = [(3, 4), (1, 1), (5, 5), (2, 1), (9, 30)]
    rows = [batching.Row([1] * prompt, [2] * response) for prompt, response in lengths]
    seen = []
    for indices, batch in batching.micro_batches(rows, 20, rank=0, n_ranks=1):
        seen += indices
        assert len(indices) == 1 or batch.attention_mask.sum() <= 20
        assert batch.targets.sum() == sum(len(rows[i].response_ids) for i in indices)
    assert sorted(seen) == list(range(5))


def test_micro_batches_share_rows_out():
    """Batches that run at the same time are of like work; the batch with the most rows is halved."""
    rows = [batching.Row([prompt], [2] * n) for prompt, n in enumerate((1, 2, 9, 9))]
    assert plans_of(rows, 11, 2) == [[[2], [1]], [[3], [0]]]
    rows = [batching.Row([prompt], [2] * n) for prompt, n in enumerate((9, 2, 2, 2))]
    assert plans_of(rows, 12, 2) == [[[0]], [[1, 2, 3]]]
    rows = [batching.Row([prompt], [2] * n) for prompt, n in enumerate((9, 9, 9, 2, 2, 2))]
    assert plans_of(rows, 12, 2) == [[[0], [2]], [[1], [3, 4, 5]]]
    rows = [batching.Row([prompt], [2] * 4) for prompt in range(6)]
    assert plans_of(rows, 12, 2) == [[[2, 3], [0]], [[4, 5], [1]]]


def test_micro_batches_are_of_like_size():
    """Filled one after the other they would hold 4 + 1 rows of 10 tokens, and 23, 28 and 3 tokens."""
    rows = [batching.Row([1], [2] * 9)] * 5
    assert [len(indices) for indices in plans_of(rows, 40, 1)[0]] == [3, 2]
    rows = [batching.Row([n], [2] * (n - 1)) for n in (12, 11, 10, 9, 5, 4, 3)]
    assert plans_of(rows, 30, 1) == [[[1, 2], [3, 4, 5, 6], [0]]]  # 21, 21 and 12 tokens


# ---- Flow reward

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
SCORE = torch.tensor(
    [[1.0, 2.0, 3.0, 5.0], [4.0, 2.0, 9.0, 9.0], [2.0, 2.0, 2.0, 0.0], [7.0, 7.0, 7.0, 7.0]]
)


def test_normalise_by_hand():
    """Regressions: full rows start at their minimum; constant and empty rows are 0, not NaN."""

    def normalise(bilateral: bool, power: float) -> torch.Tensor:
        return rlfr.normalise(SCORE, MASK, bilateral, rows_together=1, power=power)

    expected = torch.tensor([[0.0, 0.25, 0.5, 1.0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(normalise(bilateral=False, power=1.0), expected)
    torch.testing.assert_close(normalise(bilateral=False, power=2.0), expected**2)
    expected = torch.tensor([[-1.0, -0.5, 0.0, 1.0], [1, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(normalise(bilateral=True, power=1.0), expected)


def test_group_scope_keeps_what_tells_responses_apart():
    got = rlfr.normalise(SCORE[:2], MASK[:2], bilateral=False, rows_together=2)
    torch.testing.assert_close(got, torch.tensor([[0, 0.25, 0.5, 1.0], [0.75, 0.25, 0, 0]]))


@pytest.mark.parametrize(
    ("threshold", "top_k", "expected"),
    [
        (0.6, None, [0, 0.7, 0.9, 0.61, 0]),
        (0.6, 2, [0, 0.7, 0.9, 0, 0]),
        (0.0, 1, [0, 0, 0.9, 0, 0]),
        (0.0, None, [0.1, 0.7, 0.9, 0.61, 0.6]),
    ],
)
def test_select_by_hand(threshold, top_k, expected):
    score = torch.tensor([[0.1, 0.7, 0.9, 0.61, 0.6]])
    got = rlfr.select(score, threshold, top_k, bilateral=False)
    assert torch.equal(got, torch.tensor([expected]))


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [(None, [-0.9, 0.7, 0.9, -0.7, 0, 0.8]), (2, [-0.9, 0, 0.9, 0, 0, 0])],
)
def test_select_both_tails_by_hand(top_k, expected):
    score = torch.tensor([[-0.9, 0.7, 0.9, -0.7, 0.1, 0.8]])
    got = rlfr.select(score, 0.6, top_k, bilateral=True)
    assert torch.equal(got, torch.tensor([expected]))


def test_select_of_nothing():
    nothing = torch.zeros(1, 5)
    assert rlfr.select(nothing, 0.6, 2, bilateral=False).equal(nothing)


# ---- Advantages


def test_outcome_advantages_by_hand():
    reward = torch.tensor([1.0, 0, 0, 1, 0.5, 0.5, 0.5, 0.5])
    std = math.sqrt(1 / 3)
    for baseline, size in {
        "grpo": 0.5 / std,
        "rloo": 2 / 3,
        "dr_grpo": 0.5,
        "reinforce++": 0.5,
    }.items():
        expected = torch.tensor([size, -size, -size, size, 0, 0, 0, 0])
        got = rlfr.outcome_advantage(reward, 4, baseline)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert rlfr.outcome_advantage(reward, 4, "reinforce").equal(reward)


def test_equal_rewards_have_no_advantage():
    """Regression: 8 rewards of 0.7 have a mean that rounds off; the official code gives -0.83."""
    for value in (0.7, 0.1, 1 / 3):
        for baseline in ("grpo", "rloo", "dr_grpo"):
            assert rlfr.outcome_advantage(torch.full((24,), value), 8, baseline).abs().max() == 0
    assert rlfr.varied_groups(torch.tensor([0.7, 0.7, 0.7, 0.1]), 2).tolist() == [False, True]


def test_token_returns_by_hand():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    reward = torch.tensor([[1.0, 2.0, 4.0], [1.0, 2.0, 100.0]])
    assert rlfr.token_returns(reward, mask, 1.0).tolist() == [[7, 6, 4], [3, 2, 0]]
    assert rlfr.token_returns(reward, mask, 0.5).tolist() == [[3, 4, 4], [2, 2, 0]]


def test_entropy_advantage_by_hand():
    advantage = torch.tensor([[1.0, -1.0, 0.0]])
    entropy = torch.tensor([[0.5, 9.0, 9.0]], requires_grad=True)
    got = rlfr.entropy_advantage(advantage, entropy, alpha=0.4, kappa=2.0)
    assert got.tolist() == [pytest.approx([1.2, -0.5, 0.0])]
    assert not got.requires_grad


def test_whiten():
    mask = torch.tensor([[1, 1], [1, 0]]).bool()
    got = rlfr.whiten(torch.tensor([[1.0, 2.0], [3.0, 99.0]]), mask)
    torch.testing.assert_close(got, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize("n_tokens", [0, 1])
def test_whiten_of_a_single_token_is_0(n_tokens):
    """Regression: one value has no standard deviation, and the advantage was NaN."""
    mask = torch.tensor([[True, False]]) & (n_tokens == 1)
    assert rlfr.whiten(torch.tensor([[3.0, 99.0]]), mask).tolist() == [[0, 0]]


# ---- Losses


def loss_and_gradient(loss, ratio, advantage, mask, clip=(0.2, 0.2)):
    """The loss of each token, its gradient by the log-probs, and where it was clipped, as lists.

    ratio: of the policy now and before, for each token; before, all log-probs were -1
    """
    old = -torch.ones_like(ratio)
    logp = (old + ratio.log()).requires_grad_()
    value, clipped = rlfr.policy_loss(logp, old, advantage, mask, loss, clip)
    (value * mask).sum().backward()
    return value.tolist(), logp.grad.tolist(), clipped.tolist()


def test_ppo_by_hand():
    """The last ratio, 9, is capped at 3."""
    ratio = torch.tensor([[1.1, 1.5, 0.5, 0.5, 9.0]])
    advantage = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0]])
    arguments = ("ppo", ratio, advantage, torch.ones(1, 5, dtype=torch.bool))
    loss, gradient, clipped = loss_and_gradient(*arguments)
    assert loss == [pytest.approx([-1.1, -1.2, -0.5, 0.8, 3.0])]
    assert gradient == [pytest.approx([-1.1, 0.0, -0.5, 0.0, 0.0])]
    assert clipped == [[False, True, False, True, False]]
    higher, _, _ = loss_and_gradient(*arguments, clip=(0.2, 0.28))
    assert higher[0][1] == pytest.approx(-1.28)


def test_gspo_by_hand():
    """The ratio of a response is the geometric mean of its tokens'; the last column is padding.

    Row 0: sqrt(0.9 * 1.6) = 1.2, inside [0.7, 1.3] though 1.6 is not. Row 1: sqrt(1.8 * 3.2) = 2.4.
    Row 2: sqrt(0.2 * 0.8) = 0.4. Row 3 is a single token.
    """
    ratio = torch.tensor([[0.9, 1.6, 50.0], [1.8, 3.2, 50.0], [0.2, 0.8, 50.0], [1.1, 50.0, 50.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 0], [1, 0, 0]]).bool()
    advantage = torch.tensor(
        [[2.0, -1.0, 5.0], [2.0, -1.0, 5.0], [2.0, -1.0, 5.0], [-3.0, 5.0, 5.0]]
    )
    loss, gradient, clipped = loss_and_gradient("gspo", ratio, advantage, mask, clip=(0.3, 0.3))
    of_response = [row[: sum(kept)] for row, kept in zip(loss, mask.tolist(), strict=True)]
    # above the interval only a positive advantage is clipped, below it only a negative one
    assert of_response == [
        pytest.approx([-2.4, 1.2]),
        pytest.approx([-2.6, 2.4]),
        pytest.approx([-0.8, 0.7]),
        pytest.approx([3.3]),
    ]
    assert gradient == [
        pytest.approx([-2.4, 1.2, 0.0]),
        pytest.approx([0.0, 2.4, 0.0]),
        pytest.approx([-0.8, 0.0, 0.0]),
        pytest.approx([3.3, 0.0, 0.0]),
    ]
    of_response = [row[: sum(kept)] for row, kept in zip(clipped, mask.tolist(), strict=True)]
    assert of_response == [[False, False], [True, False], [False, True], [False]]


def test_gspo_of_a_row_without_tokens():
    mask = torch.tensor([[True], [False]])
    ones = torch.ones(2, 1)
    loss, gradient, _ = loss_and_gradient("gspo", ones, ones, mask)
    assert loss[0] == [-1.0] and gradient == [[-1.0], [0.0]]


def test_cispo_by_hand():
    """Every token has a gradient; the ratio weighs it, from 0.8 to 1.2 at most."""
    ratio = torch.tensor([[1.1, 1.5, 0.5, 0.5, 1.5, 1.5, 50.0]])
    advantage = torch.tensor([[2.0, 2.0, 2.0, -1.0, -1.0, 0.0, 5.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 0]]).bool()
    loss, gradient, clipped = loss_and_gradient("cispo", ratio, advantage, mask)
    weight = [1.1, 1.2, 0.8, 0.8, 1.2, 1.2]
    logp = (ratio.log() - 1)[0].tolist()
    expected = [-w * a * p for w, a, p in zip(weight, advantage[0].tolist(), logp, strict=False)]
    assert loss[0][:6] == pytest.approx(expected)
    assert loss[0][0] == pytest.approx(-2.2 * (math.log(1.1) - 1))
    assert gradient == [pytest.approx([-2.2, -2.4, -1.6, 0.8, 1.2, 0.0, 0.0])]
    assert clipped[0][:6] == [False, True, True, True, True, False]
    _, gradient, clipped = loss_and_gradient("cispo", ratio, advantage, mask, clip=(1.0, 4.0))
    assert gradient == [pytest.approx([-2.2, -3.0, -1.0, 0.5, 1.5, 0.0, 0.0])]
    assert not any(clipped[0][:6])


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_losses_where_the_policy_has_not_moved(loss):
    """All ratios are 1, and the gradient is minus the advantage."""
    advantage = torch.tensor([[1.5, -0.5], [0.0, -2.0]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    _, gradient, clipped = loss_and_gradient(loss, torch.ones(2, 2), advantage, mask)
    assert gradient == (-advantage).tolist()
    assert clipped == [[False, False], [False, False]]


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_no_advantage_has_neither_loss_nor_gradient(loss):
    """So the update may leave out responses whose advantages are 0."""
    ratio = torch.tensor([[0.1, 9.0, 1.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    value, gradient, clipped = loss_and_gradient(loss, ratio, torch.zeros(1, 3), mask)
    assert not any([*value[0], *gradient[0], *clipped[0]])


@pytest.mark.parametrize("loss", ["ppo", "gspo", "cispo"])
def test_losses_do_not_depend_on_the_other_rows_of_a_batch(loss):
    """A micro-batch has whole responses, and as much padding as its longest one needs."""
    generator = torch.Generator().manual_seed(0)
    logp, old, advantage = torch.randn(3, 4, 6, generator=generator)
    mask = torch.arange(6) < torch.tensor([[3], [6], [1], [4]])
    together, _ = rlfr.policy_loss(logp, old, advantage, mask, loss, (0.2, 0.2))
    for row, length in enumerate(mask.sum(dim=1)):
        cells = (slice(row, row + 1), slice(length))
        parts = (logp[cells], old[cells], advantage[cells], mask[cells])
        alone, _ = rlfr.policy_loss(*parts, loss, (0.2, 0.2))
        torch.testing.assert_close(alone, together[cells])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("sequence", (2.5 + 10 + 6) / 3), ("token", 32 / 7), ("constant", 32 / (3 * 6))],
)
def test_token_weights_do_not_depend_on_micro_batches(kind, expected):
    """Regression: a mean of micro-batch means weights episodes unevenly.

    Here the denominator is the mini-batch's.
    """
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    loss = torch.tensor([[1.0, 2, 3, 4], [10, 0, 0, 0], [5, 7, 0, 0]])

    def part(rows: list[int]) -> float:
        weights = rlfr.token_weights(mask[rows], kind, n_episodes=3, n_tokens=7, max_tokens=6)
        return (loss[rows] * weights).sum().item()

    assert part([0, 1, 2]) == pytest.approx(expected)
    assert part([0, 1]) + part([2]) == pytest.approx(expected)


def test_kl_by_hand():
    d = torch.tensor([0.5])
    for kind, expected in {"k1": 0.5, "k2": 0.125, "k3": math.exp(-0.5) - 0.5}.items():
        assert rlfr.kl_divergence(d, torch.zeros(1), kind).item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("none", [1, 1, 1, 1]),
        ("token", [2, 0.75, 1, 1.5]),
        ("sequence", [2, 2, 2, 1.5]),
        ("mask", [0, 0.75, 1, 1.5]),
    ],
)
def test_importance_weights_by_hand(mode, expected):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    sampled = torch.tensor([[0.0, 0.0, torch.nan], [0.0, 0.0, 0.0]])
    trained = torch.tensor([[math.log(4.0), math.log(0.75), 0.3], [math.log(1.5), 8.0, 8.0]])
    weights = rlfr.importance_weights(trained, sampled, mask, mode, cap=2.0)
    torch.testing.assert_close(weights[mask], torch.tensor(expected, dtype=torch.float32))
    if mode == "none":
        assert (weights == 1).all()
        below_1 = rlfr.importance_weights(trained, sampled, mask, mode, cap=0.5)
        assert (below_1 == 1).all(), "no weights, hence no cap"
    figures = rlfr.mismatch_figures(trained, sampled, mask, cap=2.0)
    assert figures == {  # of the ratios before the cap
        "mismatch/ratio_max": pytest.approx(4),
        "mismatch/ratio_mean": pytest.approx(7.25 / 4),
        "mismatch/over_cap": 0.25,
        "mismatch/nan": 1,
    }


def test_online_flow_weights_by_hand():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    accepted = torch.tensor([True, False])
    tokens, rows = rlfr.online_flow_weights(mask, accepted, None, None, soft=0.25)
    assert rows.tolist() == [1, 0.25]
    assert tokens.tolist() == [[0.25] * 4, [0.5, 0.5, 0, 0]]
    everything = torch.tensor([True, True])
    entropy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 50.0, 60.0]])
    tokens, rows = rlfr.online_flow_weights(mask, everything, entropy, 0.5, soft=0.5)
    assert rows.tolist() == [1, 1]
    expected = torch.tensor([[1 / 6, 1 / 6, 1 / 3, 1 / 3], [1 / 3, 2 / 3, 0, 0]])
    torch.testing.assert_close(tokens, expected)


def test_padding_does_not_move_the_entropy_quantile():
    """Departure: the official quantile depends on how wide the batch is."""
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    entropy = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 50.0, 60.0]])
    wide_mask = torch.nn.functional.pad(mask, (0, 3))
    wide_entropy = torch.nn.functional.pad(entropy, (0, 3), value=99.0)
    everything = torch.tensor([True, True])
    tokens, _ = rlfr.online_flow_weights(mask, everything, entropy, 0.5, soft=0.5)
    wider, _ = rlfr.online_flow_weights(wide_mask, everything, wide_entropy, 0.5, soft=0.5)
    torch.testing.assert_close(wider[:, :4], tokens)


# ---- Schedules


def test_learning_rate():
    rates = [rlfr.learning_rate(1.0, step, 100, 0.1, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[10] == pytest.approx(1.0)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing():
    module = torch.nn.Linear(3, 1, bias=False)
    before = module.weight.tolist()
    learner = parallel.Learner(module, (0.9, 0.95), 0.0)
    module.weight.grad = torch.tensor([[1.0, torch.nan, 0.0]])
    assert math.isnan(learner.step(1.0, 1.0))
    assert module.weight.tolist() == before
    assert module.weight.grad is None


def test_biases_and_norms_do_not_decay():
    torch.manual_seed(0)
    flow = fl.Flow(fl.FlowConfig(dim=16, n_blocks=1))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter)
        parameter.grad = torch.zeros_like(parameter)  # only the decay moves it
    before = {name: p.detach().clone() for name, p in flow.named_parameters()}
    parallel.Learner(flow, (0.9, 0.999), 0.5).step(0.1, 1.0)
    for name, parameter in flow.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim > 1 else 1
        torch.testing.assert_close(parameter, before[name] * factor, msg=name)


# ---- Memory of an update; tests/test_published.py has what an H100 measured
@pytest.mark.parametrize("family", memory.PLAIN_DECODERS)
def test_what_a_layer_keeps_of_a_token(family):
    """Against what autograd saves of the layers of a bfloat16 model, each storage counted once."""
    config = copy.deepcopy(FAMILIES[family])
    config.update({"hidden_size": 128, "intermediate_size": 384, "head_dim": 32})
    decoder = hf.AutoModel.from_config(config).bfloat16()
    decoder.norm = torch.nn.Identity()
    weights = {parameter.untyped_storage().data_ptr() for parameter in decoder.parameters()}
    saved = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    n_tokens = 256
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = decoder(torch.zeros(1, n_tokens, dtype=torch.int64))
    assert output.last_hidden_state.requires_grad
    total = sum(storage.nbytes() for storage in saved.values())
    per_layer = total / n_tokens / config.num_hidden_layers
    assert memory.layer_bytes(config) == pytest.approx(per_layer, rel=0.02)
