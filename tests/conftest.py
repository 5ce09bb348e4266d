"""Fixtures: a tiny embedded world, and tiny random models of several families."""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # read when the libraries are imported
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="hub-")  # tests put models there

import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

import eval as evaluation  # noqa: E402
import flow as fl  # noqa: E402
import parallel  # noqa: E402
import rlfr  # noqa: E402
import rollout  # noqa: E402
import toy  # noqa: E402

torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
parallel.start()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> toy.World:
    """The embedded world in small: a base model that has seen little, few problems."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    return toy.make(
        toy.World(str(folder), steps=30, batch_size=32, hidden_size=32, n_layers=3, n_train=64, n_test=16, n_expert=48)
    )


@pytest.fixture(scope="session")
def flow_folder(world, tmp_path_factory) -> str:
    """A flow for the small world, with random weights in every tensor, so that each matters."""
    torch.manual_seed(1)
    flow = fl.Flow(fl.FlowConfig(dim=32, n_blocks=2))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    folder = tmp_path_factory.mktemp("flow")
    fl.save_flow(flow, folder)
    return str(folder)


@pytest.fixture(scope="session")
def policy(world) -> rlfr.Policy:
    return rlfr.load_policy(world.path("model")).to(parallel.DEVICE)


def read_lines(path) -> list[dict]:
    """Read a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def load_problems(file: str) -> list[rollout.Problem]:
    """Load problems of the small world."""
    config = evaluation.Config(template="none", max_prompt_tokens=64, problem_column="problem")
    return rollout.load_problems(file, config, AutoTokenizer.from_pretrained(str(Path(file).with_name("model"))))


def figures(folder) -> list[dict]:
    """Metrics without times."""
    lines = read_lines(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def last_state(folder) -> dict:
    """Tensors and numbers of the newest checkpoint, flat."""
    newest = max((Path(folder) / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    dcp_to_torch_save(newest, Path(folder) / "state.pt")
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(torch.load(Path(folder) / "state.pt", weights_only=True))
    return {torch.utils._pytree.keystr(path): leaf for path, leaf in leaves}


def flags(config) -> list[str]:
    """A configuration as command-line flags."""
    given = []
    for name, value in vars(config).items():
        default = type(config).__dataclass_fields__[name].default
        if value is True:
            given.append(f"--{name.replace('_', '-')}")
        elif value != default and value is not None:
            given += [f"--{name.replace('_', '-')}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    return given
