"""The method in one file: course/nano.py computes what train_rl.py and train_flow.py do."""

import os
import random
import re
import subprocess
import sys

import IPython.display
import jupytext
import matplotlib.pyplot as plt
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
        weights[f"modulation.{kind}"] = torch.cat(parts)
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
    rates = {"lr": nano.LR, "flow_lr": nano.FLOW_LR}
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
    """Return responses as roll_out() of nano.py does, and rewards as verify() does, by group."""
    n_tokens = max(len(episode.response_ids) for episode in episodes)
    rows = torch.full((len(episodes), n_tokens), padding)
    for row, episode in zip(rows, episodes, strict=True):
        row[: len(episode.response_ids)] = torch.tensor(episode.response_ids)
    reward = torch.tensor([episode.verdict.reward for episode in episodes])
    return rows.split(GROUP_SIZE), reward.split(GROUP_SIZE)


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
    taps = {"TAPS": models.dense.layers, "N_LAYERS": LAYERS}
    for name, value in {**settings, **taps}.items():
        monkeypatch.setattr(nano, name, value)
    groups, rewards = as_nano(episodes, padding)
    steps, verdicts = iter([groups]), iter(rewards)
    drawn = iter(noise[:, 0].split(lengths, dim=1))
    monkeypatch.setattr(random, "sample", lambda rows, n: rows[:n])  # as sample_episodes() does
    monkeypatch.setattr(nano, "roll_out", lambda *_: next(steps))
    monkeypatch.setattr(nano, "verify", lambda *_: next(verdicts))
    monkeypatch.setattr(nano, "fit_flow", lambda flow, *_: flow.load_state_dict(start))
    monkeypatch.setattr(torch, "randn_like", lambda _: next(drawn))
    read, shaped = spy(monkeypatch, "read"), spy(monkeypatch, "shape")
    weighed, updates = spy(monkeypatch, "ppo_loss"), spy(monkeypatch, "update")
    with pytest.raises(StopIteration):  # there are episodes for one step
        nano.main(world.folder)

    # ---- train_rl.py
    experience = train_rl.score(models, episodes, 0, 1.0, config.compute.tokens_per_gpu)
    advantage, flow_reward, _ = train_rl.shape_advantage(experience, models.dense, config, 0)
    figures = train_rl.update_policy(models, experience, advantage, config, 0, nano.LR)
    figures |= train_rl.update_dense(models, config.optimisation.clip_norm)

    # ---- They are the same
    mask = experience.mask
    assert 0 < experience.correct.sum() < len(episodes) and len(set(lengths)) > 1
    assert [arguments[1] for arguments, _ in read] == [each.prompt_ids for each in episodes]
    assert [arguments[2] for arguments, _ in read] == [each.response_ids for each in episodes]
    close = {"rtol": 1e-4, "atol": 1e-4}
    score = torch.cat([score for (score,), _ in shaped])
    torch.testing.assert_close(score, experience.score[mask], **close)
    its_reward = torch.cat([result for _, result in shaped])
    torch.testing.assert_close(its_reward, flow_reward[mask], rtol=1e-4, atol=1e-6)
    assert (flow_reward != 0).sum(dim=1).max() == TOP_K
    _, old_logp, its_advantage = (
        torch.cat([arguments[i] for arguments, _ in weighed]) for i in range(3)
    )
    torch.testing.assert_close(its_advantage, advantage[mask], **close)
    torch.testing.assert_close(old_logp, experience.old_logp[mask], **close)
    (policy, _, loss), (flow, _, flow_loss) = (arguments for arguments, _ in updates)
    assert loss.item() == pytest.approx(figures["policy/loss"], rel=1e-4, abs=1e-6)
    assert flow_loss.item() == pytest.approx(figures["flow/loss"], rel=1e-4)
    for name, weight in by_names_of_nano(models.dense.module.model).items():
        torch.testing.assert_close(flow.state_dict()[name], weight, **close)
        assert not torch.equal(weight, start[name]), f"{name} has learnt nothing"
    learnt = models.policy.model.state_dict()
    for name, weight in policy.state_dict().items():
        torch.testing.assert_close(weight, learnt[name], **close)


def test_the_loss_of_the_offline_start_is_that_of_train_flow(flow_of_one_block, monkeypatch):
    """The sum of delta over the rows of the same latents, times and noise, and its gradient."""
    flow = fl.load_flow(flow_of_one_block, dim=32)
    net = nano.VelocityNet(32)
    net.load_state_dict(by_names_of_nano(flow.model))
    latents = torch.randn(2, LAYERS, 7, 32)
    x_0 = torch.randn(LAYERS, 7, 32)
    t = torch.rand(LAYERS, 7, 1)
    x_1, context = latents.flatten(1, 2)
    exists = torch.ones(LAYERS, 1, 7, dtype=torch.bool)
    rows = fl.FlowRows(x_1, context, torch.tensor([0.25, 0.5, 0.75]), exists)
    theirs = fl.matching_loss(flow, rows, x_0[:, None], t.movedim(2, 1))
    monkeypatch.setattr(torch, "randn_like", lambda _: x_0)
    ours = nano.velocity_error(net, latents, t)
    torch.testing.assert_close(ours.flatten(), theirs, rtol=1e-4, atol=1e-5)
    ours.sum().backward()
    gradient = flow.model.input_proj.weight.grad
    torch.testing.assert_close(net.input.weight.grad, gradient, rtol=1e-3, atol=1e-4)


def test_the_ratio_is_clipped():
    """The ratio of a run is 1, as a step has one update; here it is not."""
    old_logp = torch.randn(64, 9)
    logp = old_logp + torch.empty(64, 9).uniform_(-1, 1)
    advantage = torch.randn(64, 9)
    theirs, is_clipped = rlfr.ppo_loss(logp, old_logp, advantage, (0.2, 0.2))
    torch.testing.assert_close(nano.ppo_loss(logp, old_logp, advantage), theirs)
    assert is_clipped.any() and not is_clipped.all()


def test_a_response_of_one_token_has_no_penalty():
    """Its score is the least and the largest; others have penalties."""
    assert nano.shape(torch.tensor([3.0])).tolist() == [0.0]
    penalties = nano.shape(torch.tensor([1.0, 2.0, 3.0, 2.8]))
    torch.testing.assert_close(penalties, torch.tensor([0.0, 0.0, -0.01, -0.009]))


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
    rows = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    assert nano.verify(tokenizer, rows["input_ids"], "3").tolist() == list(texts.values())


def test_a_whole_run(world, monkeypatch, capsys):
    """From the files of the world to policy and flow that have learnt."""
    small = {"STEPS": 2, "PROMPTS": 2, "MAX_TOKENS": 12, "FLOW_STEPS": 60, "FLOW_BATCH": 16}
    taps = {"TAPS": (1, 2), "N_LAYERS": LAYERS}
    for name, value in {**small, **taps}.items():
        monkeypatch.setattr(nano, name, value)
    errors, rolled = spy(monkeypatch, "velocity_error"), spy(monkeypatch, "roll_out")
    read = spy(monkeypatch, "read")
    nano.main(world.folder)
    before, after = (errors[step][1].mean().item() for step in (0, 59))
    assert after < 0.9 * before
    (_, tokenizer, problems), groups = rolled[0]
    assert [group.shape[0] for group in groups] == [nano.GROUP_SIZE] * 2
    prompts = [tokenizer.encode(row["problem"]) for row in problems for _ in range(nano.GROUP_SIZE)]
    first_step = [arguments for arguments, _ in read[48 : 48 + 2 * nano.GROUP_SIZE]]
    assert [prompt for _, prompt, _ in first_step] == prompts
    for _, _, response in first_step:
        assert tokenizer.pad_token_id not in response
        assert tokenizer.eos_token_id not in response[:-1]
        assert len(response) == 12 or response[-1] == tokenizer.eos_token_id
    said = capsys.readouterr().out
    assert re.search(r"^offline start: 60 steps, loss \d\.\d+$", said, re.MULTILINE)
    assert len(re.findall(r"^step \d+  reward \d\.\d+$", said, re.MULTILINE)) == 2


def test_it_is_short_and_stands_alone():
    file = ROOT / "course" / "nano.py"
    assert len(file.read_text().splitlines()) <= 250
    assert imports_of(file) & floors().keys() == {"worlds"}


# ---- The notebook
def read_notebook(parameters: dict) -> nbformat.NotebookNode:
    """Return the notebook with values in the place of those of its cell of parameters."""
    notebook = jupytext.read(SOURCE)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    return notebook


def run_notebook(parameters: dict) -> nbformat.NotebookNode:
    """Run the notebook in a kernel of its own."""
    notebook = read_notebook(parameters)
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


@pytest.mark.filterwarnings("ignore:Glyph")  # of control characters, which this world's model says
def test_the_notebook_runs(world, monkeypatch, capsys):
    """All cells, in this process: a kernel takes most of its time to import what is here already."""
    small = {"STEPS": 1, "PROMPTS": 2, "FLOW_STEPS": 1, "HELD_OUT": 2, "FOLDER": world.folder}
    taps = {"nano.TAPS": (1, 2), "nano.N_LAYERS": LAYERS}
    for name in ("TAPS", "N_LAYERS", "FLOW_STEPS"):
        monkeypatch.setattr(nano, name, None)  # the notebook sets it; afterwards it is what it was
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    shown, figures = [], []
    monkeypatch.setattr(IPython.display, "display", shown.append)
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf().canvas.draw()))
    names = {}
    with plt.rc_context():
        for cell in read_notebook({**small, **taps}).cells:
            if cell.cell_type == "code":
                exec(compile(cell.source, str(SOURCE), "exec"), names)
        plt.close("all")
    printed = capsys.readouterr().out
    assert printed.count("held-out problems") == 2 and "step   1" in printed
    assert len(figures) == 3
    (page,) = [each.data for each in shown if "<iframe" in each.data]
    assert "Recorded steps: 1; problems in each: 2." in page


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
    before, after = map(float, re.findall(r"([\d.]+)% right", printed))
    assert 30 <= before <= 60 and after >= 80


@pytest.mark.slow
def test_the_default_run(tmp_path):
    """`python -m course.nano`: 30 to 65 % right responses at first, at least 90 % at the end."""
    command = [sys.executable, "-m", "course.nano"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rewards = list(map(float, re.findall(r"reward ([\d.]+)", done.stdout)))
    assert len(rewards) == nano.STEPS
    assert 0.3 <= rewards[0] <= 0.65
    assert sum(rewards[-10:]) / 10 >= 0.9
