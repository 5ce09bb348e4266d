"""Fixtures: a tiny embedded world, and tiny random models of several families."""

# ruff: noqa: E402

import copy
import gc
import io
import json
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}  # read when the libraries are imported
os.environ["HF_HUB_CACHE"] = tempfile.mkdtemp(prefix="hub-")  # tests put models there
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import infra.waiting  # noqa: F401

# isort: split
import pytest
import torch
import transformers
from browser import Browser, read_port
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import dense
import flow as fl
import rollout
import train_rl
from engines.torch_engine import TorchEngine
from engines.vllm_engine import VllmEngine
from infra import parallel, vision
from infra.data import Problem, ProblemSettings, load_problems
from infra.models import LoadingSettings, Model, find_model
from infra.settings import change, flatten
from policy import Policy, load_policy
from worlds import toy


def pytest_configure():
    """Let no command that runs in this process end it with 0, as if all tests had passed."""
    tests = os.getpid()
    leave = os._exit
    os._exit = lambda code: leave(70 if os.getpid() == tests else code)


# Files whose few tests take long begin first, so that no process is left alone with them at the end
LONG_ONES = (
    *("distributed", "vision", "train", "dense", "benchmarks", "referee", "judge", "vllm"),
    *("study", "options_change", "lora", "eval", "pool", "plan", "rlfr", "nano"),
)


def pytest_collection_modifyitems(items):
    """Bring the long files to the front; `-n 2 --dist loadfile --no-loadscope-reorder` keeps them there."""
    places = {f"test_{name}": place for place, name in enumerate(LONG_ONES)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
parallel.start()


@pytest.fixture(autouse=True)
def process_group():
    """Start the process group anew, if a vLLM engine took it away when it went."""
    parallel.start()


@contextmanager
def files_of_at_most(n_bytes: int):
    """Let no file of this process have more bytes, which ends a write as a full disk does.

    What is printed meanwhile goes nowhere: the output of the tests may be a file, and longer.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def run_with_vllm(main, config) -> None:
    """Run a script's main in this process, and let its vLLM engine go now, not amid a later test."""
    main(config)
    gc.collect()
    parallel.start()


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> toy.World:
    """The embedded world in small: a base model that has seen little, few problems."""
    folder = tmp_path_factory.mktemp("world") / "toy"
    return toy.make(
        toy.World(
            str(folder),
            steps=30,
            batch_size=32,
            hidden_size=32,
            n_layers=3,
            n_train=64,
            n_test=16,
            n_expert=48,
        )
    )


@pytest.fixture(scope="session")
def flow_folder(world, tmp_path_factory) -> str:
    """A flow for the small world, with random weights in every tensor, so that each matters."""
    torch.manual_seed(1)
    flow = fl.Flow(fl.FlowConfig(dim=32, n_blocks=2, calibrated_at=(0.5, 0.8)))
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    flow.expert_mean.fill_(1.0)
    flow.expert_spread.fill_(0.2)
    return save_flow(flow, tmp_path_factory.mktemp("flow"))


@pytest.fixture(scope="session")
def image_world(tmp_path_factory) -> toy.World:
    """The image world in small."""
    folder = tmp_path_factory.mktemp("world") / "toy-vl"
    sizes = {"hidden_size": 32, "n_layers": 3, "n_train": 64, "n_test": 16, "n_expert": 48}
    return toy.make(toy.World(str(folder), steps=30, batch_size=32, images=True, **sizes))


def small_run(world: toy.World, flow: str, folder, **settings) -> train_rl.Config:
    """Two small steps of training in a small world, with the settings given."""
    values = {
        "model": world.path("model"),
        "data": world.path("train.jsonl"),
        "flow": flow,
        "template": "none",
        "prompts": 4,
        "group_size": 4,
        "train_batch": 8,
        "max_tokens": 16,
        "max_prompt_tokens": 64,
        "steps": 2,
        "lr": 1e-3,
        "flow_lr": 1e-3,
        "save_every": 0,
        "folder": str(folder),
    }
    return change(train_rl.Config(), **{**values, **settings})


# A run whose rewards differ within groups, also of responses that ran out of room
BY_LENGTH = {"reward": (str(ROOT / "tests" / "length_reward.py"),), "grade_truncated": True}
# The same in some groups; in the others all are equal
SOME_GROUPS = {"reward": (str(ROOT / "tests" / "some_groups_reward.py"),), "grade_truncated": True}


@pytest.fixture
def config(world, flow_folder, tmp_path) -> train_rl.Config:
    """A small run, for modules that have no fixture of this name."""
    return small_run(world, flow_folder, tmp_path / "run", **BY_LENGTH)


def flow_reward_of(config: train_rl.Config) -> dense.FlowReward:
    """The flow reward of some settings, with a flow that scores nothing."""
    flow = fl.Flow(fl.FlowConfig(dim=4, n_blocks=1))
    settings = (config.flow_reward, config.flow_update)
    return dense.FlowReward(
        flow, 4, *settings, seed=config.seed, group_size=config.sampling.group_size
    )


def shape_advantage(
    experience: train_rl.Experience, config: train_rl.Config
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Do what train_rl.shape_advantage does in the first step, with the flow reward or with none."""
    reward = flow_reward_of(config) if config.shaping == "flow" else None
    return train_rl.shape_advantage(experience, reward, config, 0)


def score_and_learn(*arguments, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what flow.score_and_learn does; return the mean score over taps (M,) and the loss (M,)."""
    by_tap, loss = fl.score_and_learn(*arguments, **options)
    return by_tap.mean(dim=0), loss


@pytest.fixture
def seen(monkeypatch) -> list[tuple[train_rl.Experience, torch.Tensor, torch.Tensor]]:
    """Experience, advantage and dense reward of each step: the tensors that are written."""
    calls = []
    describe = train_rl.describe_rollouts

    def spy(models, experience, shaped, *rest):
        calls.append((experience, shaped["advantage"], shaped["dense_reward"]))
        return describe(models, experience, shaped, *rest)

    monkeypatch.setattr(train_rl, "describe_rollouts", spy)
    return calls


def experience_of(mask: torch.Tensor, **known) -> train_rl.Experience:
    """The experience of a step, zeros but for what is known; each response token is scored.

    known: fields of train_rl.Experience, reward and correct (B,), dense_score (L, B, T)
    """
    nothing = torch.zeros(mask.shape)
    values = {
        "episodes": [],
        "reward": torch.zeros(len(mask)),
        "correct": torch.zeros(len(mask), dtype=torch.bool),
        "sampled_logp": nothing,
        "old_logp": nothing,
        "entropy": nothing,
        "ref_logp": nothing,
        "dense_score": nothing[None],
        "scored": mask,
    }
    return train_rl.Experience(mask=mask, **{**values, **known})


@pytest.fixture(scope="session")
def merging_tokenizer():
    """A byte-level BPE as of a real model; some merges end or begin inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"vocab_size": 330, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(**settings)
    texts = [(ROOT / "README.md").read_text(), " 日本 人日 … € 😀 سلام 語学 本語 " * 100]
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="session")
def policy(world) -> Policy:
    return load_policy(world.path("model")).to(parallel.DEVICE)


@pytest.fixture(scope="session")
def train_once(tmp_path_factory):
    """Train with the settings given, and return the folder: once, however many tests compare with it."""
    folders = {}

    def train(config: train_rl.Config) -> str:
        key = change(config, folder=None)
        if key not in folders:
            folder = str(tmp_path_factory.mktemp("shared") / "run")
            train_rl.main(change(config, folder=folder))
            folders[key] = folder
        return folders[key]

    return train


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium, for all pages."""
    driver_path = shutil.which("chromedriver")
    assert driver_path, "these tests need Chromium: apt-get install chromium chromium-driver"
    with subprocess.Popen([driver_path, "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
        try:
            url = f"http://127.0.0.1:{read_port(driver.stdout)}"
            browser = Browser(url, tmp_path_factory.mktemp("profile"))
            yield browser
            browser.call("", None, "DELETE")
        finally:
            driver.terminate()


# Decoders of several families, with weights so large that a mistake shows
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_chunk_size": 16}
PLAIN_FAMILIES = {  # nothing but plain attention passes between tokens
    "qwen2": transformers.Qwen2Config(**TINY),
    "qwen3": transformers.Qwen3Config(**TINY, head_dim=8),
    "llama": transformers.LlamaConfig(**TINY, tie_word_embeddings=True),
    "mistral": transformers.MistralConfig(**TINY, sliding_window=None),
    "mistral with a window": transformers.MistralConfig(**TINY, sliding_window=3),
    "gemma": transformers.GemmaConfig(**TINY, head_dim=8),
    "gemma2": transformers.Gemma2Config(
        **TINY, head_dim=8, final_logit_softcapping=2.0, attn_logit_softcapping=None
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **{**TINY, "num_hidden_layers": 7}, head_dim=8, sliding_window=3
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(**TINY, **EXPERTS, head_dim=8),
}
OTHER_FAMILIES = {  # softcaps, sinks, recurrent states, convolutions
    "gemma2 with a softcap": transformers.Gemma2Config(
        **TINY, head_dim=8, attn_logit_softcapping=1.0
    ),
    "gpt_oss": transformers.GptOssConfig(
        **TINY, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=3
    ),
    "qwen3_5": transformers.Qwen3_5TextConfig(**TINY, **LINEAR),
    "qwen3_next": transformers.Qwen3NextConfig(
        **TINY, **LINEAR, **EXPERTS, shared_expert_intermediate_size=16
    ),
    "lfm2": transformers.Lfm2Config(**TINY, full_attn_idxs=[2], block_multiple_of=8),
    "falcon_h1": transformers.FalconH1Config(**TINY, **MAMBA),
}
FAMILIES = PLAIN_FAMILIES | OTHER_FAMILIES


def tiny_model(family: str, **changes) -> transformers.PreTrainedModel:
    """A random model of a family; its configuration is its own, whatever a policy writes there."""
    config = copy.deepcopy(FAMILIES[family])
    config.update(changes)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).train()


def plain_model(family: str, **changes) -> transformers.PreTrainedModel:
    """The same model with Hugging Face's eager attention, which says what is right."""
    model = tiny_model(family, **changes)
    model.set_attn_implementation("eager")
    return model


def tiny_vlm(family: str):
    """A random model of a vision-language family, for the image world's tokenizer; its words are far from certain."""
    tokenizer = toy.make_tokenizer(images=True)
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    image, video, opened, closed = (
        tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in names
    )
    ids = {
        "image_token_id": image,
        "video_token_id": video,
        "vision_start_token_id": opened,
        "vision_end_token_id": closed,
    }
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [4, 6, 6]}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, rope_parameters=rope,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    tower = dict(
        hidden_size=32,
        num_heads=2,
        intermediate_size=48,
        out_hidden_size=64,
        patch_size=14,
        initializer_range=0.2,
    )
    if family == "qwen2_vl":
        tower = dict(depth=2, embed_dim=32, num_heads=2, mlp_ratio=2, hidden_size=64)
        config = transformers.Qwen2VLConfig(text_config=text, vision_config=tower, **ids)
    elif family == "qwen2_5_vl":
        tower |= dict(depth=2, fullatt_block_indexes=[1])
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=tower, **ids)
    else:
        tower |= dict(depth=3, deepstack_visual_indexes=[0, 1], num_position_embeddings=16)
        text |= dict(
            head_dim=32,
            rope_parameters=rope | {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        )
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=tower, **ids)
    torch.manual_seed(0)
    return transformers.AutoModelForImageTextToText.from_config(config)


def save_vlm(model, folder) -> str:
    """Save a model with the image world's tokenizer and image processor."""
    for part in (model, toy.make_tokenizer(images=True), toy.make_processor()):
        part.save_pretrained(folder)
    return str(folder)


def drawing(problem: str, processor) -> vision.Image:
    """A drawn problem as the data set gives it."""
    (images,) = vision.load_images(
        [{"images": toy.encode(toy.draw(problem, random.Random(problem)))}],
        "images",
        processor,
        ".",
    )
    return images[0]


def copy_with_edits(copy: Path, diffs: list[str], files: dict[str, str]) -> Path:
    """Copy the clone without its tests and runs, apply diffs, add files by path; return the copy."""
    ignored = shutil.ignore_patterns(".*", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for i, diff in enumerate(diffs):
        (copy / f"{i}.diff").write_text(diff)
        done = subprocess.run(
            ["git", "apply", f"{i}.diff"],
            cwd=copy,
            capture_output=True,
            text=True,
            env=os.environ | {"GIT_CEILING_DIRECTORIES": str(copy.parent)},
        )
        assert done.returncode == 0, done.stderr
    for path, text in files.items():
        (copy / path).write_text(text)
    return copy


def read_lines(path) -> list[dict]:
    """Read a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def find_model_in(folder) -> Model:
    """Find a model in a folder, with default settings."""
    return find_model(str(folder), LoadingSettings())


def problems_in(file: str) -> list[Problem]:
    """Load problems of the small world."""
    settings = ProblemSettings(template="none", max_prompt_tokens=64, problem_column="problem")
    return load_problems(file, settings, find_model_in(Path(file).with_name("model")))


def torch_engine(folder) -> TorchEngine:
    """The torch engine of a model in a folder."""
    model = find_model_in(folder)
    return TorchEngine(model, 256, torch.device("cpu"), torch.float32)


def vllm_engine(
    folder,
    max_length: int,
    max_sequences: int = 64,
    device="cpu",
    dtype=torch.float32,
    can_sleep: bool = True,
) -> VllmEngine:
    """The vLLM engine of a model in a folder."""
    settings = rollout.EngineSettings(max_sequences=max_sequences)
    model = find_model_in(folder)
    capacity = rollout.Capacity(max_length, max_images=4)
    return VllmEngine(model, settings, capacity, torch.device(device), dtype, can_sleep)


def requests(prompts, seeds=None) -> list[rollout.Request]:
    """Requests for prompts, each with its seed, by default 0."""
    seeds = [0] * len(prompts) if seeds is None else seeds
    return [rollout.Request(list(p), seed) for p, seed in zip(prompts, seeds, strict=True)]


def save_flow(flow: fl.Flow, folder) -> str:
    """Save a flow in a folder, which is made if need be."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    fl.save_flow(flow.config, flow.state_dict(), folder)
    return str(folder)


def figures(folder) -> list[dict]:
    """Metrics without times."""
    lines = read_lines(Path(folder) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]


def last_state(folder) -> dict:
    """Tensors and numbers of the newest checkpoint, flat."""
    newest = max((Path(folder) / "checkpoints").iterdir(), key=lambda p: int(p.name.split("-")[1]))
    dcp_to_torch_save(newest, Path(folder) / "state.pt")
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(
        torch.load(Path(folder) / "state.pt", weights_only=True)
    )
    return {torch.utils._pytree.keystr(path): leaf for path, leaf in leaves}


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def flags(config) -> list[str]:
    """A configuration as command-line flags."""
    given = []
    defaults = flatten(type(config)())
    for name, value in flatten(config).items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            given.append(flag)
        elif value != defaults[name] and value is not None:
            values = value if isinstance(value, tuple) else [value]
            given += [flag, *map(str, values)]
    return given
