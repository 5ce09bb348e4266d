"""Several ranks: the same numbers as one, whatever is killed, and clean exits. KILL_TRIALS and EXIT_RUNS ask for more."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import forks
import pytest
import torch
from conftest import (
    BY_LENGTH,
    ROOT,
    SOME_GROUPS,
    figures,
    flags,
    free_port,
    last_state,
    problems_in,
    read_lines,
    requests,
    run_with_vllm,
    small_run,
    torch_engine,
)
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import Qwen2Config, Qwen2ForCausalLM

import eval as evaluation
import flow as fl
import rollout
import train_flow
import train_rl
from infra import batching, parallel
from infra.settings import change
from policy import load_policy
from run import export_checkpoint

pytestmark = pytest.mark.distributed
TIMEOUT = 1800  # seconds until a process hangs, and is not only slow
KILL_TRIALS, EXIT_RUNS = int(os.environ.get("KILL_TRIALS", 1)), int(os.environ.get("EXIT_RUNS", 2))


def start(script, arguments: list[str], n_ranks: int = 2) -> forks.Run:
    """Start a script on ranks that find each other as under torchrun."""
    return forks.Run(script, arguments, n_ranks)


def output_of(process: forks.Run | subprocess.Popen) -> str:
    """Wait until a process has ended, and return what it printed."""
    output, _ = process.communicate(timeout=TIMEOUT)
    return output


def check_exit(process: forks.Run | subprocess.Popen) -> str:
    """Wait until a process has ended with code 0, and return what it printed."""
    output = output_of(process)
    assert process.returncode == 0, output  # whole: what ended it may stand far above
    return output


def finish(*arguments) -> str:
    return check_exit(start(*arguments))


def ranks_of(torchrun: forks.Run) -> list[int]:
    """Process ids of the ranks."""
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(torchrun.pid)], capture_output=True, text=True
    ).stdout
    return [int(pid) for pid in found.split()]


def wait_for_step(folder: str, step: int, process: forks.Run) -> None:
    """Wait until so many steps are logged."""
    file = Path(folder) / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if file.exists() and len(file.read_text().splitlines()) >= step:
            return
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")


@pytest.fixture(scope="module")
def config(world, flow_folder, tmp_path_factory) -> train_rl.Config:
    folder = tmp_path_factory.mktemp("distributed") / "one"
    settings = {"steps": 5, "save_every": 1, "keep": 3, "export_every": 4}
    settings |= {"flow_soft": 1.0, "tokens_per_gpu": 300}
    return small_run(world, flow_folder, folder, **settings, **BY_LENGTH)


@pytest.fixture(scope="module")
def one(config) -> str:
    """The run of one process."""
    train_rl.main(config)
    return config.folder


@pytest.fixture(scope="module")
def two(config) -> str:
    """The run of two ranks."""
    folder = config.folder.replace("one", "two")
    finish("train_rl.py", flags(change(config, folder=folder)))
    return folder


def assert_same_run(folder: str, other: str) -> None:
    """Figures and weights agree to 1e-5."""
    for a, b in zip(figures(folder), figures(other), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)
    a, b = last_state(folder), last_state(other)
    assert a.keys() == b.keys()
    for name in (name for name in a if "['module']" in name and "k_proj.bias" not in name):
        # the gradient of a key's bias is 0 but for rounding, which AdamW blows up
        assert (a[name] - b[name]).norm() <= 1e-5 * a[name].norm(), name


# ---- B. The same numbers


def test_two_ranks_follow_one_process(one, two):
    assert_same_run(one, two)
    kept = sorted(path.name for path in Path(two, "checkpoints").iterdir())
    assert kept == ["step-3", "step-4", "step-5"], "--keep"
    for name in ("policy/model.safetensors", "flow/flow.safetensors"):
        assert Path(one, name).stat().st_size == Path(two, name).stat().st_size


@pytest.mark.parametrize("shaping", ["none", "flow"])
def test_two_ranks_leave_out_what_a_step_does_not_need(config, tmp_path, shaping):
    """Episodes without a gradient."""
    settings = {"shaping": shaping, "train_batch": 16, "steps": 2, "export_every": 0}
    if shaping == "none":
        settings["flow"] = None
    config = change(config, **settings, **SOME_GROUPS)
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    train_rl.main(change(config, folder=one))
    finish("train_rl.py", flags(change(config, folder=two)))
    assert_same_run(one, two)


def environment_of_node(folder: Path, model: str) -> dict[str, str]:
    """A node's own caches in a folder, that of the hub with a model as small/world, and its interface."""
    repository = folder / "hub" / "models--small--world"
    shutil.copytree(model, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (folder / "tmp").mkdir()
    names = {"HF_HUB_CACHE": "hub", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TMPDIR": "tmp"}
    caches = {name: str(folder / place) for name, place in names.items()}
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    return {"HF_HOME": str(folder), **caches, "GLOO_SOCKET_IFNAME": loopback}


def test_two_nodes_follow_one_process(one, config, tmp_path):
    """They share the run's folder, data and flow, and each finds the model in a cache of its own."""
    folder = config.folder.replace("one", "nodes")
    command = [sys.executable, "-m", "torch.distributed.run"]
    command += ["--nnodes", "2", "--nproc-per-node", "1", "--local-addr", "localhost"]
    command += ["--rdzv-backend", "c10d", "--rdzv-id", "run"]
    command += ["--rdzv-endpoint", f"localhost:{free_port()}", str(ROOT / "train_rl.py")]
    command += flags(change(config, folder=folder, model="small/world"))
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    nodes = []
    for name in ("first", "second"):
        variables = environment_of_node(tmp_path / name, config.model)
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        nodes.append(subprocess.Popen(command, env=environment, **streams))
    for process in nodes:
        check_exit(process)
    assert_same_run(one, folder)


def test_offline_start_on_two_ranks(world, tmp_path):
    config = change(train_flow.Config(), model=world.path("model"), data=world.path("expert.jsonl"), template="none", batch_size=10, lr=1e-3, epochs=1,
        flow_blocks=2, noise_repeats=2, max_prompt_tokens=64, tokens_per_gpu=200, folder=str(tmp_path / "one"),
    )  # fmt: skip
    two = start("train_flow.py", flags(change(config, folder=str(tmp_path / "two"))))
    train_flow.main(config)
    check_exit(two)
    assert_same_run(config.folder, str(tmp_path / "two"))


@pytest.mark.vllm
# two engines of a rank each are shared out as other engines are
@pytest.mark.parametrize("tensor_parallel", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_vllm_on_two_ranks(config, tmp_path, tensor_parallel):
    """An engine for each rank, or one for both: the first step's episodes are those of one process."""
    if tensor_parallel == 2:  # with a head for each rank
        model, other = Path(config.model), tmp_path / "model"
        shutil.copytree(model, other)
        torch.manual_seed(0)
        heads = Qwen2Config.from_pretrained(
            model, hidden_size=64, num_attention_heads=2, num_key_value_heads=2
        )
        Qwen2ForCausalLM(heads).save_pretrained(other)
        config = change(config, model=str(other), shaping="none", flow=None)
        for left in Path("/dev/shm").glob(
            "-tp:*cpushm*"
        ):  # vLLM on a CPU leaves it behind and stumbles over it
            left.unlink()
    config = change(
        config, engine="vllm", tensor_parallel=tensor_parallel, steps=2, max_sequences=32
    )
    two = start("train_rl.py", flags(change(config, folder=str(tmp_path / "two"))))
    alone = str(tmp_path / "one")
    run_with_vllm(train_rl.main, change(config, tensor_parallel=1, folder=alone))
    assert "engine: vllm on cpu" in check_exit(two)
    a, b = figures(tmp_path / "two")[0], figures(alone)[0]
    assert (
        a == pytest.approx(b, rel=1e-3, abs=1e-3)
        and a["reward"] == b["reward"]
        and a["length"] == b["length"]
    )


@pytest.mark.parametrize(
    "options",
    [
        {"offload": "always"},
        {"offload": "sampling", "recompute_layers": 2},
        {"compile": "on"},
        {"compile": "on", "recompute_layers": 2},
    ],
    ids=str,
)
def test_where_weights_live_changes_nothing(config, one, tmp_path, options, monkeypatch):
    # the graphs are made, and run without the code of which a CPU has to wait for minutes
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    train_rl.main(change(config, folder=str(tmp_path / "run"), **options))
    assert_same_run(one, str(tmp_path / "run"))


def test_bfloat16_computes_in_it_and_keeps_float32(config, tmp_path):
    train_rl.main(change(config, folder=str(tmp_path / "run"), dtype="bfloat16", steps=2))
    state = last_state(tmp_path / "run")
    assert all(t.dtype == torch.float32 for name, t in state.items() if "['module']" in name)
    exported = load_policy(str(tmp_path / "run" / "policy"))
    assert {p.dtype for p in exported.parameters()} == {torch.bfloat16}, (
        "what the engine sampled with"
    )
    policy = load_policy(config.model)
    parallel.shard(policy, policy.layers, torch.bfloat16)
    scored = policy(batching.collate([batching.Row([1, 2], [3, 4])]), 1.0, taps=[1])
    assert scored.latents[0].dtype == torch.bfloat16 and scored.logp.dtype == torch.float32
    scored.logp.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in policy.parameters())


def test_a_host_copy_gives_back_what_it_took(config):
    """What is tied is copied once; a learner goes on as if nothing had happened."""
    learners = []
    for _ in range(2):
        policy = load_policy(config.model)
        parallel.shard(policy, policy.layers, torch.float32)
        learners.append(parallel.Learner(policy, (0.9, 0.95), 0.0))
    plain, offloaded = learners
    batch = batching.collate([batching.Row([1, 2, 3], [4, 5, 6, 7])])
    host_copy = parallel.HostCopy(offloaded.tensors())
    n_parameters = sum(p.numel() for p in policy.parameters())
    n_steps = len(offloaded.parameters)
    assert sum(host_copy.sizes) == 4 * (3 * n_parameters + n_steps)
    for _ in range(2):
        for learner in learners:
            learner.module(batch).logp.sum().backward()
            learner.step(lr=1e-2, max_norm=1.0)
        host_copy.offload()
        held = [bytes_below(tensor) for tensor in offloaded.tensors()]
        assert set(held) == {0}
        host_copy.restore()
    for got, expected in zip(offloaded.tensors(), plain.tensors(), strict=True):
        assert torch.equal(parallel.gather(got), parallel.gather(expected))


def bytes_below(tensor: torch.Tensor) -> int:
    """Bytes below a tensor, or below this rank's part of it."""
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage().nbytes()


def test_a_forward_between_backward_and_step_leaves_nothing_stale(config):
    """Regression: a root that stays gathered after a forward keeps its old weights over the step, silently."""
    plain, policy = (load_policy(config.model) for _ in range(2))
    parallel.shard(policy, policy.layers, torch.float32)
    batch = batching.collate([batching.Row([1, 2, 3], [4, 5, 6, 7])])
    for module in (plain, policy):
        learner = parallel.Learner(module, (0.9, 0.95), 0.0)
        module(batch).logp.sum().backward()
        with torch.no_grad():
            module(batch)
        learner.step(lr=1e-2, max_norm=1.0)
    with torch.no_grad():
        torch.testing.assert_close(policy(batch).logp, plain(batch).logp, rtol=1e-4, atol=1e-4)


# ---- Sharing out


def test_micro_batches_of_all_ranks():
    """Every pair once, as many batches a rank, tokens balanced, within the budget."""
    rng = random.Random(0)
    pairs = [batching.Row([1] * rng.randint(1, 9), [2] * rng.randint(1, 60)) for _ in range(24)]
    lengths = [len(row.prompt_ids) + len(row.response_ids) for row in pairs]
    for n_ranks in (1, 2, 3, 8):
        plans = [
            [rows for rows, _ in batching.micro_batches(pairs, 100, rank, n_ranks)]
            for rank in range(n_ranks)
        ]
        assert sorted(i for plan in plans for rows in plan for i in rows) == list(range(24))
        assert len({len(plan) for plan in plans}) == 1
        tokens = [sum(lengths[i] for rows in plan for i in rows) for plan in plans]
        assert max(tokens) < 1.5 * min(tokens)
        for rows in (rows for plan in plans for rows in plan):
            assert len(rows) == 1 or sum(lengths[i] for i in rows) <= 100


@dataclass
class Recorder:
    """An engine that says what it was asked."""

    n_ranks: int = 1
    asked: list = field(default_factory=list)

    def generate(self, requests, sampling):
        self.asked.append(requests)
        return [
            rollout.Episode(request.prompt_ids, [request.seed + i], [0.0], "stop", "")
            for request in requests
            for i in range(sampling.n)
        ]


def test_rollouts_are_balanced_by_expected_tokens(monkeypatch):
    """Ranks play one after the other: each takes the share that its number gives, and results come back in order."""
    prompts, seeds, expected = (
        [[i] for i in range(7)],
        [10 * i for i in range(7)],
        [1, 9, 1, 1, 4, 4, 2],
    )
    engines = [Recorder() for _ in range(2)]
    dealt: list = [None, None]
    monkeypatch.setattr(rollout.dist, "get_world_size", lambda: 2)
    for rank in (0, 1, 0):  # the third pass sees what both have made
        monkeypatch.setattr(rollout.dist, "get_rank", lambda rank=rank: rank)

        def gather(found, own, rank=rank, group=None):
            dealt[rank] = own
            found[:] = [each if each is not None else [own[0]] * (14 - len(own)) for each in dealt]

        monkeypatch.setattr(rollout.dist, "all_gather_object", gather)
        episodes = rollout.generate_on_all_ranks(
            engines[rank], requests(prompts, seeds), rollout.Sampling(2), expected
        )
    assert [episode.response_ids[0] for episode in episodes] == [
        s + i for s in seeds for i in range(2)
    ]
    loads = [sum(expected[r.prompt_ids[0]] for r in engine.asked[0]) for engine in engines]
    assert sum(loads) == sum(expected) and max(loads) - min(loads) <= 1


# ---- Exports


def shapes_of(file: Path) -> dict:
    """Names, dtypes and shapes of the weights in a file."""
    weights = load_file(file)
    return {name: (weights[name].dtype, weights[name].shape) for name in sorted(weights)}


@pytest.mark.vllm
def test_checkpoints_of_any_number_of_ranks_are_exported(one, two, config, world, tmp_path):
    """run.py export gives the weights that the engine got after that step, and others load them.

    vLLM loads those of two ranks, in a process of its own, which it spoils.
    """
    policies = {"one": tmp_path / "one" / "policy", "two": tmp_path / "two" / "policy"}
    for name, folder in {"one": one, "two": two}.items():
        export_checkpoint(folder, 4, str(tmp_path / name))
    evaluation_config = change(evaluation.Config(), data=(world.path("test.jsonl"),), template="none", max_tokens=24)  # fmt: skip
    with_vllm = change(evaluation_config, model=str(policies["two"]), engine="vllm", out=str(tmp_path / "vllm"))  # fmt: skip
    process = start("eval.py", flags(with_vllm), 1)

    files = {name: {file.name for file in policy.iterdir()} for name, policy in policies.items()}
    assert files["one"] == files["two"]
    for file in files["one"] - {"model.safetensors"}:
        a, b = (policy / file for policy in policies.values())
        assert a.read_bytes() == b.read_bytes(), file
    a, b = (shapes_of(policy / "model.safetensors") for policy in policies.values())
    assert a == b

    responses = {}
    for name, folder in {"one": one, "two": two}.items():
        by_the_run = Path(folder, "exports", "step-4", "policy")  # what the run's engine was given
        exported = torch_engine(policies[name])
        state = exported.model.state_dict()
        for key, tensor in torch_engine(by_the_run).model.state_dict().items():
            assert torch.equal(tensor, state[key]), key
        exported_flow = fl.load_flow(tmp_path / name / "flow", 32)
        assert exported_flow.config == fl.load_flow(config.flow, 32).config
        out = tmp_path / f"{name}-torch"
        evaluation.main(change(evaluation_config, model=str(policies[name]), out=str(out)))
        responses[name] = [record["response"] for record in read_lines(out / "samples.jsonl")]
        problems = problems_in(world.path("test.jsonl"))
        for problem, response in zip(problems, responses[name], strict=True):
            ids = torch.tensor([problem.prompt_ids])  # by transformers
            generated = exported.model.generate(
                ids, do_sample=False, max_new_tokens=24, eos_token_id=exported.end_tokens.tolist()
            )
            tokens = generated[0, ids.shape[1] :]
            assert exported.tokenizer.decode(tokens, skip_special_tokens=True) == response
    assert len(set(responses["one"])) > 1
    check_exit(process)
    records = read_lines(tmp_path / "vllm" / "samples.jsonl")
    assert [record["response"] for record in records] == responses["two"]


# ---- C. Killed


def test_killed_at_random_and_resumed_on_two_ranks_and_on_one(config, one, two, tmp_path):
    rng = random.Random(time.time_ns())
    for trial in range(KILL_TRIALS):
        folder, step, delay = str(tmp_path / f"{trial}"), rng.randint(1, 4), rng.random() / 2
        process = start("train_rl.py", flags(change(config, folder=folder)))
        wait_for_step(folder, step, process)
        time.sleep(delay)
        process.kill()
        process.communicate()
        left = sorted(p.name for p in Path(folder, "checkpoints").glob("*"))
        for checkpoint in (name for name in left if not name.endswith(".writing")):
            dcp_to_torch_save(Path(folder, "checkpoints", checkpoint), tmp_path / "readable.pt")
        alone = folder + "-alone"
        shutil.copytree(folder, alone)
        resumed = start("train_rl.py", ["--resume", folder, "--reward", *config.reward])
        train_rl.main(change(config, folder=folder, resume=alone))
        check_exit(resumed)
        told = f"killed {delay:.2f} s after step {step}, left {left}"
        assert figures(folder) == figures(two), told
        a, b = last_state(folder), last_state(two)
        assert all(
            torch.equal(x, b[name]) if isinstance(x, torch.Tensor) else x == b[name]
            for name, x in a.items()
        ), told
        assert_same_run(one, alone)
        assert not list(Path(folder).rglob("*.writing"))


# ---- F. Signals, lost ranks, exits


# a single process has tests/test_stopping.py
@pytest.mark.parametrize("n_ranks", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_signal_saves_and_exits_0(config, tmp_path, n_ranks):
    """SIGTERM to one rank, SIGINT to the only one: the step ends, a whole checkpoint is there, and the run goes on from it."""
    folder = str(tmp_path / "run")
    long = change(config, folder=folder, steps=300, save_every=1000)
    process = (forks.torchrun if n_ranks > 1 else start)("train_rl.py", flags(long), n_ranks)
    wait_for_step(folder, 2, process)
    os.kill(
        (ranks_of(process) if n_ranks > 1 else [process.pid])[0],
        signal.SIGTERM if n_ranks > 1 else signal.SIGINT,
    )
    output = check_exit(process)
    assert (
        "finishing this step, then saving" in output and f"go on with --resume {folder}" in output
    )
    (saved,) = Path(folder, "checkpoints").iterdir()
    done = len(figures(folder))
    assert saved.name == f"step-{done}" and 2 <= done < 300
    assert last_state(folder)["['progress']['step']"] == done
    export_checkpoint(folder, out=str(tmp_path / "out"))
    for file in ("policy/model.safetensors", "flow/flow.safetensors"):
        assert (tmp_path / "out" / file).exists(), "what a signal stopped is exported, too"


def test_a_second_signal_exits_at_once(config, tmp_path):
    """In a step that does not end: a reward waits."""
    folder, mark, reward = str(tmp_path / "run"), tmp_path / "mark", tmp_path / "reward.py"
    reward.write_text(
        "import pathlib, time\n\ndef reward(problem, response):\n"
        f"    pathlib.Path({str(mark)!r}).touch()\n    time.sleep({TIMEOUT})\n"
    )
    slow = change(config, folder=folder, reward=(str(reward),))
    process = start("train_rl.py", flags(slow), 1)
    while not mark.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    while "finishing this step" not in process.stdout.readline():
        assert process.poll() is None  # two signals that come together would be noted as one
    process.send_signal(signal.SIGTERM)
    output_of(process)
    assert process.returncode == 128 + signal.SIGTERM


def test_a_killed_rank_takes_the_others_down(config, tmp_path):
    folder = str(tmp_path / "run")
    process = forks.torchrun("train_rl.py", flags(change(config, folder=folder, steps=300)))
    wait_for_step(folder, 2, process)
    os.kill(ranks_of(process)[1], signal.SIGKILL)
    output = output_of(process)
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in output[-600:]


@pytest.fixture(scope="module")
def failed(config, tmp_path_factory) -> dict[str, str]:
    """What two runs that fail print, of which one cannot start, side by side."""
    folder = tmp_path_factory.mktemp("failed")
    reward = folder / "reward.py"
    reward.write_text(
        "import os\ncalls = 0\ndef reward(problem, response):\n    global calls\n    calls += 1\n"
        "    if calls > 20 and os.environ['RANK'] == '1': raise RuntimeError('planted')\n    return float(len(response) % 3)\n"
    )
    configs = {
        "planted": change(config, folder=str(folder / "planted"), reward=(str(reward),), steps=300),
        "settings": change(config, folder=str(folder / "settings"), train_batch=1),
    }
    processes = {name: forks.torchrun("train_rl.py", flags(each)) for name, each in configs.items()}
    outputs = {name: output_of(process) for name, process in processes.items()}
    assert all(process.returncode != 0 for process in processes.values())
    assert not (folder / "settings").exists()
    return outputs


def test_the_error_of_the_rank_that_failed_comes_last(failed):
    output = failed["planted"]
    last = output[output.rindex("Root Cause") :]
    assert "rank      : 1 " in last and "RuntimeError: planted" in last, last


def test_bad_settings_say_so_once_more_at_the_end(failed):
    assert "train_batch=1 is not a multiple of the 2 ranks; choose one" in failed["settings"][-400:]


@pytest.mark.slow
def test_run_after_run_exits_0(config, tmp_path):
    """Two at a time; every run of these tests is asked for its code."""
    runs_of_a_step = [
        flags(change(config, folder=str(tmp_path / f"{n}"), steps=1)) for n in range(EXIT_RUNS)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda arguments: finish("train_rl.py", arguments), runs_of_a_step))
