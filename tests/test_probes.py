"""Before the first step: does the engine sample from the model that is trained?"""

from pathlib import Path

import pytest
import torch
from conftest import problems_in, torch_engine

import inspector
import rollout
import train_rl
from engines.choice import make_engine
from engines.probes import check_log_probs, check_probes, sample_probes
from engines.torch_engine import TorchEngine

MESSAGE = r"/model: the engine's log-probs differ from the trainer's by \d+\.\d\d in the mean"


@pytest.fixture
def disturbed(monkeypatch):
    """Engines that lose a part of the model when they take weights."""
    load_weights = TorchEngine.load_weights

    def disturb(engine, weights):
        load_weights(engine, weights)
        for layer in engine.model.model.layers:
            layer.self_attn.o_proj.weight.data.zero_()

    monkeypatch.setattr(TorchEngine, "load_weights", disturb)


def test_training_ends_before_a_step_if_the_engine_has_another_model(config, disturbed):
    with pytest.raises(ValueError, match=MESSAGE):
        train_rl.main(config)
    assert not Path(config.folder, "metrics.jsonl").exists()


def test_so_does_the_inspector(config, disturbed):
    with pytest.raises(ValueError, match=MESSAGE):
        inspector.sample_and_inspect(config)


def test_probes_fit_into_the_shortest_settings(world, policy):
    engine = torch_engine(world.path("model"))
    probes = sample_probes(engine, max_prompt_tokens=2, max_tokens=3)
    assert [len(probe.prompt_ids) for probe in probes] == [2] * len(probes)
    assert all(1 <= len(probe.response_ids) <= 3 for probe in probes)
    check_probes(policy, probes, "model")


@pytest.mark.parametrize("difference", [0.2, -0.2, float("nan")])
def test_a_difference_of_log_probs(world, difference):
    problem = problems_in(world.path("test.jsonl"))[0]
    probe = rollout.Episode(problem.prompt_ids, [1, 2], [-1.0, -2.0], "stop", "")
    logp = torch.tensor([-1.01, -1.99])
    check_log_probs([probe], logp, "model")
    with pytest.raises(ValueError, match="model: the engine's log-probs differ"):
        check_log_probs([probe], logp + difference, "model")


def test_an_engine_that_takes_minutes_says_so_first(world, monkeypatch, capsys):
    said = []

    def start(*_):
        said.append(capsys.readouterr().out)
        return "engine"

    monkeypatch.setattr("engines.choice.VllmEngine", start)
    settings = rollout.EngineSettings(engine="vllm")
    cuda = torch.device("cuda", 0)
    capacity = rollout.Capacity(100)
    make_engine("model", settings, capacity, cuda, torch.bfloat16, can_sleep=True)
    assert said == ["vLLM starts, which takes one to four minutes\n"]
