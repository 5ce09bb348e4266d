"""The method in one file: course/nano.py computes what train_rl.py and train_flow.py do."""

import os
import random
import re
import subprocess
import sys

import jupytext
import nbformat
import pytest
import torch
from conftest import ROOT, save_flow, small_run, torch_engine
from nbclient import NotebookClient
from test_rooms import floors, imports_of
from transformers import AutoTokenizer

import flow as fl
import rlfr
import rollout
import train_rl
from course import nano
from infra import parallel
from infra.data import load_problems
from rewards import Verdict
from worlds import toy

SOURCE = ROOT / "course" / "nano_notebook.py"
PROMPTS = 4
GROUP_SIZE = 4
TOP_K = 2  # so few that it binds in short responses
LAYERS = 3
# Modules of the network, and what flow.py calls them; the modulations are one layer in nano.py
NAMES = {
    "input": "input_proj",
    "context": "cond_embed",
    "time": "time_embed.mlp",
    "depth": "layer_embed.mlp",
    "block_norm": "res_blocks.0.in_ln",
    "block": "res_blocks.0.mlp",
    "output_norm": "final_layer.norm_final",
    "output": "final_layer.linear",
}
MODULATIONS = ("res_blocks.0.adaLN_modulation.1", "final_layer.adaLN_modulation.1")


def by_names_of_nano(net: fl.VelocityNet) -> dict[str, torch.Tensor]:
    """Return the weights of a flow by the names that nano.py gives them."""
    state = net.state_dict()
    weights = {}
    for name, theirs in NAMES.items():
        for key in state:
            if key.startswith(f"{theirs}."):
                weights[name + key.removeprefix(theirs)] = state[key]
    for kind in ("weight", "bias"):
        parts = [state[f"{name}.{kind}"] for name in MODULATIONS]
        weights[f"modulation.1.{kind}"] = torch.cat(parts)
    return weights


@pytest.fixture(scope="module")
def flow_of_one_block(tmp_path_factory) -> str:
    """A flow with as many blocks as the default run's, and random weights in every tensor."""
    torch.manual_seed(2)
    flow = fl.Flow(fl.FlowConfig(dim=32, n_blocks=1))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return save_flow(flow, tmp_path_factory.mktemp("flow"))


@pytest.fixture
def config(world, flow_of_one_block, tmp_path) -> train_rl.Config:
    batch = {"prompts": PROMPTS, "group_size": GROUP_SIZE, "train_batch": PROMPTS * GROUP_SIZE}
    rates = {"lr": nano.LR, "flow_lr": nano.ONLINE_LR}
    rewards = {"flow_top_k": TOP_K, "flow_threshold": nano.THRESHOLD}
    return small_run(world, flow_of_one_block, tmp_path / "run", **batch, **rates, **rewards)


def sample_episodes(config: train_rl.Config, model) -> list[rollout.Episode]:
    """Sample a step's episodes; their lengths are drawn, and rewards, equal in the last group."""
    problems = load_problems(config.data, config.problems, model)
    requests = [rollout.Request(row.prompt_ids, 10 * i) for i, row in enumerate(problems[:PROMPTS])]
    sampling = rollout.Sampling(GROUP_SIZE, 1.0, config.sampling.max_tokens)
    episodes = torch_engine(model.path).generate(requests, sampling)
    rng = random.Random(0)
    for i, episode in enumerate(episodes):
        length = rng.randint(1, config.sampling.max_tokens)
        episode.response_ids = episode.response_ids[:length]
        episode.logp = episode.logp[:length]
        right = i < (PROMPTS - 1) * GROUP_SIZE and rng.random() < 0.5
        kind = "right" if right else "wrong"
        episode.verdict = Verdict(float(right), right, parts={}, extracted=None, kind=kind)
    return episodes


def as_nano(episodes: list[rollout.Episode], padding: int) -> tuple:
    """Return episodes as roll_out() of nano.py does: prompts on the left, responses on the right."""
    width = max(len(episode.prompt_ids) for episode in episodes)
    n_tokens = max(len(episode.response_ids) for episode in episodes)
    tokens = torch.full((len(episodes), width + n_tokens), padding)
    mask = torch.zeros(len(episodes), n_tokens, dtype=torch.bool)
    for i, episode in enumerate(episodes):
        n_response = len(episode.response_ids)
        tokens[i, width - len(episode.prompt_ids) : width] = torch.tensor(episode.prompt_ids)
        tokens[i, width : width + n_response] = torch.tensor(episode.response_ids)
        mask[i, :n_response] = True
    return tokens, mask, torch.tensor([episode.verdict.reward for episode in episodes])


def spy(monkeypatch, name: str) -> list:
    """Keep arguments and result of each call of a function of nano.py."""
    calls = []
    function = getattr(nano, name)

    def keep(*arguments, **options):
        result = function(*arguments, **options)
        calls.append((arguments, result))
        return result

    monkeypatch.setattr(nano, name, keep)
    return calls


def test_a_step_is_one_of_train_rl(world, config, monkeypatch):
    """The same model, flow, episodes and noise: scores, advantages, losses and learnt weights."""
    config, model = train_rl.resolve(config)
    models = train_rl.make_models(config, model, is_flow_named=True)
    models = train_rl.with_learners(models, config.optimisation.weight_decay)
    start = by_names_of_nano(models.dense.module.model)
    start = {name: weight.clone() for name, weight in start.items()}
    episodes = sample_episodes(config, model)
    padding = model.tokenizer.pad_token_id
    assert not any(padding in episode.response_ids for episode in episodes), "take another seed"
    lengths = [len(episode.response_ids) for episode in episodes]
    keys = [("flow noise", config.seed, 0, i) for i in range(len(episodes))]
    noise, _ = fl.draw(models.dense.module.config, keys, lengths, parallel.DEVICE)

    # ---- nano.py, its loop for one step
    settings = {"STEPS": 2, "PROMPTS": PROMPTS, "GROUP_SIZE": GROUP_SIZE, "TOP_K": TOP_K}
    depths = [layer / LAYERS for layer in models.dense.layers]  # of four layers they are its own
    for name, value in {**settings, "DEPTHS": depths}.items():
        monkeypatch.setattr(nano, name, value)
    steps = iter([as_nano(episodes, padding)])
    evaluated = []
    monkeypatch.setattr(nano, "roll_out", lambda *_: next(steps))
    monkeypatch.setattr(nano, "fit_flow", lambda flow, *_: flow.load_state_dict(start))
    monkeypatch.setattr(nano, "evaluate", lambda policy, *_: evaluated.append(policy))
    monkeypatch.setattr(torch, "randn_like", lambda _: noise[:, 0])
    shaped, weighed = spy(monkeypatch, "shape"), spy(monkeypatch, "advantages")
    losses, read = spy(monkeypatch, "mean_of_responses"), spy(monkeypatch, "read")
    scored = spy(monkeypatch, "velocity_error")
    with pytest.raises(StopIteration):  # there are episodes for one step
        nano.main(world.folder)

    # ---- train_rl.py
    experience = train_rl.score(models, episodes, 0, 1.0, config.compute.tokens_per_gpu)
    advantage, flow_reward, _ = train_rl.shape_advantage(experience, models.dense, config, 0)
    lr = rlfr.learning_rate(nano.LR, 0, 2, warmup=0.03)
    figures = train_rl.update_policy(models, experience, advantage, config, 0, lr)
    figures |= train_rl.update_dense(models, config.optimisation.clip_norm)

    # ---- They are the same
    mask = experience.mask
    assert 0 < experience.correct.sum() < len(episodes) and len(set(lengths)) > 1
    ((score, its_mask), its_reward) = shaped[0]
    assert torch.equal(its_mask, mask)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(score, experience.score, **close)
    torch.testing.assert_close(its_reward, flow_reward, rtol=1e-4, atol=1e-6)
    assert (flow_reward != 0).sum(dim=1).max() == TOP_K
    torch.testing.assert_close(weighed[0][1] * mask, advantage, **close)
    torch.testing.assert_close(read[0][1][0] * mask, experience.old_logp, **close)
    loss, flow_loss = (result for _, result in losses)
    assert loss.item() == pytest.approx(figures["policy/loss"], rel=1e-4, abs=1e-6)
    assert flow_loss.item() == pytest.approx(figures["flow/loss"], rel=1e-4)
    flow = scored[0][0][0]
    for name, weight in by_names_of_nano(models.dense.module.model).items():
        torch.testing.assert_close(flow.state_dict()[name], weight, **close)
        assert not torch.equal(weight, start[name]), f"{name} has learnt nothing"
    learnt = models.policy.model.state_dict()
    for name, weight in evaluated[0].state_dict().items():
        torch.testing.assert_close(weight, learnt[name], **close)


def test_the_loss_of_the_offline_start_is_that_of_train_flow(world, flow_of_one_block, config):
    """The sum of delta over the rows of the same latents, times and noise, and its gradient."""
    flow = fl.load_flow(flow_of_one_block, dim=32)
    net = nano.VelocityNet(32)
    net.load_state_dict(by_names_of_nano(flow.model))
    latents = torch.randn(2, LAYERS, 7, 32)
    x_0 = torch.randn(LAYERS, 7, 32)
    t = torch.rand(LAYERS, 7)
    x_1, context = latents.flatten(1, 2)
    exists = torch.ones(LAYERS, 1, 7, dtype=torch.bool)
    rows = fl.FlowRows(x_1, context, torch.tensor(nano.DEPTHS), exists)
    theirs = fl.matching_loss(flow, rows, x_0[:, None], t[:, None])
    ours = nano.velocity_error(net, latents, x_0, t)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-4, atol=1e-5)
    ours.sum().backward()
    gradient = flow.model.input_proj.weight.grad
    torch.testing.assert_close(net.input.weight.grad, gradient, rtol=1e-3, atol=1e-4)


def test_the_ratio_is_clipped_and_rates_are_those_of_the_default_run():
    """The ratio of a run is 1, as a step has one update; here it is not."""
    old_logp = torch.randn(64, 9)
    logp = old_logp + torch.empty(64, 9).uniform_(-1, 1)
    advantage = torch.randn(64, 9)
    theirs, is_clipped = rlfr.ppo_loss(logp, old_logp, advantage, (0.2, 0.2))
    torch.testing.assert_close(nano.ppo_loss(logp, old_logp, advantage), theirs)
    assert is_clipped.any() and not is_clipped.all()
    for step in range(100):
        for warmup, floor in ((0.03, 0.1), (0.1, 0.0)):
            theirs = rlfr.learning_rate(1.0, step, 100, warmup, floor)
            assert nano.learning_rate(1.0, step, 100, warmup, floor) == pytest.approx(theirs)
    assert nano.learning_rate(1.0, 0, 1, 0.1, 0.0) == 1.0, "a run of one step"


class Says:
    """A policy that says what it is told, padded as transformers does."""

    def __init__(self, tokenizer, texts: list[str]):
        rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        self.responses = rows["input_ids"]

    def generate(self, prompts, **_settings) -> torch.Tensor:
        return torch.cat([prompts, self.responses], dim=1)


def test_rewards(world):
    """1 for the answer in a box at the end of a response that was not cut."""
    tokenizer = AutoTokenizer.from_pretrained(world.path("model"))
    texts = {
        r"1+2=3. \boxed{3}<|im_end|>": 1.0,
        r"\boxed{3}<|im_end|>": 1.0,
        r"1+2=4. \boxed{4}<|im_end|>": 0.0,
        r"1+2=3. \boxed{3}": 0.0,
        r"\boxed{3} \boxed{4}<|im_end|>": 0.0,
        "3<|im_end|>": 0.0,
    }
    problems = [{"problem": "1 +2>", "answer": "3"}] * len(texts)
    tokens, mask, reward = nano.roll_out(Says(tokenizer, list(texts)), tokenizer, problems)
    assert reward.tolist() == list(texts.values())
    lengths = [len(tokenizer.encode(text)) for text in texts]
    assert mask.sum(dim=1).tolist() == lengths and tokens.shape[1] == 5 + max(lengths)


def test_a_whole_run(world, monkeypatch, capsys):
    """From the files of the world to the evaluation of what was trained; the flow learns."""
    small = {"STEPS": 2, "PROMPTS": 2, "MAX_TOKENS": 12, "FLOW_EPOCHS": 40, "FLOW_BATCH": 16}
    for name, value in small.items():
        monkeypatch.setattr(nano, name, value)
    errors = spy(monkeypatch, "velocity_error")
    nano.main(world.folder)
    n_steps = 40 * 48 // 16
    before, after = (errors[step][1].mean().item() for step in (0, n_steps - 1))
    assert after < 0.9 * before
    said = capsys.readouterr().out
    assert re.search(rf"^offline start: {n_steps} steps, loss \d\.\d+$", said, re.MULTILINE)
    assert len(re.findall(r"^step \d+  reward 0\.\d+  score \d+\.\d+$", said, re.MULTILINE)) == 2
    held_out = r"^held-out problems: \d+\.\d% sampled, \d+\.\d% greedy$"
    assert len(re.findall(held_out, said, re.MULTILINE)) == 2


def test_it_is_short_and_stands_alone():
    file = ROOT / "course" / "nano.py"
    assert len(file.read_text().splitlines()) <= 250
    assert imports_of(file) & floors().keys() == {"worlds"}


# ---- The notebook
def run_notebook(parameters: dict) -> nbformat.NotebookNode:
    """Run the notebook with values in the place of those of its cell of parameters."""
    notebook = jupytext.read(SOURCE)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    folder = {"metadata": {"path": str(SOURCE.parent)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=folder).execute()
    return notebook


def outputs_of(notebook: nbformat.NotebookNode) -> tuple[str, list[dict]]:
    """Return what a notebook has printed, and what it shows, by MIME type."""
    printed = ""
    shown = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stdout":
                printed += output.text
            elif output.output_type == "display_data":
                shown.append(output.data)
    return printed, shown


def test_the_notebook_runs(world):
    small = {"STEPS": 2, "FLOW_EPOCHS": 2, "HELD_OUT": 4, "FOLDER": world.folder}
    printed, shown = outputs_of(run_notebook(small))
    assert printed.count("held-out problems") == 2 and "step   2" in printed
    assert sum("image/png" in data for data in shown) == 3
    (page,) = [data["text/html"] for data in shown if "<iframe" in data.get("text/html", "")]
    assert "Recorded steps: 2, groups of each: 2." in page


def test_the_notebook_is_its_source_and_small():
    """docs/development.md says how it is written anew."""
    file = SOURCE.with_name("nano.ipynb")
    assert file.stat().st_size < 600_000
    written = nbformat.read(file, as_version=4)
    source = jupytext.read(SOURCE)
    cells = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (written, source)]
    assert cells[0] == cells[1]
    printed, shown = outputs_of(written)
    assert printed.count("held-out problems") == 2 and len(shown) > 8


@pytest.mark.slow
def test_the_notebook_learns(tmp_path):
    """With its own parameters: base 30 to 60 % right, trained at least 80 %, sampled."""
    world = toy.make(toy.World(str(tmp_path / "toy")))
    printed, _ = outputs_of(run_notebook({"FOLDER": world.folder}))
    before, after = map(float, re.findall(r"([\d.]+)% sampled", printed))
    assert 30 <= before <= 60 and after >= 80


@pytest.mark.slow
def test_the_default_run(tmp_path):
    """`python -m course.nano`: base 30 to 60 %, trained at least 90 %, sampled and greedy."""
    command = [sys.executable, "-m", "course.nano"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for kind in ("sampled", "greedy"):
        before, after = map(float, re.findall(rf"([\d.]+)% {kind}", done.stdout))
        assert 30 <= before <= 60 and after >= 90
