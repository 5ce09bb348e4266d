"""What another trainer takes along: docs/elsewhere.md as it stands, in TRL, and a run's problems for verl."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, find_model_in, problems_in, small_run
from datasets import Dataset, load_dataset
from transformers import AutoModelForCausalLM

import dense
import train_rl
from infra import batching, runs
from infra.data import Problem
from infra.files import import_file
from infra.verl import write_problems
from policy import load_policy, tap_layers
from run import export_problems

PAGE = (ROOT / "docs" / "elsewhere.md").read_text()


def code_of(name: str) -> str:
    """A block of the page: that of a file, or of a name."""
    (code,) = re.findall(rf"^```python {name}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return code


def module_of(name: str, folder: Path):
    """The module of a file that the page shows."""
    path = folder / name
    path.write_text(code_of(name))
    return import_file(str(path))


# ---- TRL
class Smooth(dense.DenseReward):
    """How little latents differ from those before, at taps that are not in the layers' order."""

    taps = (0.75, 0.25)

    def score(self, part):
        steps = [part.latents(tap) - part.latents(tap, back=1) for tap in self.taps]
        return torch.stack([part.per_token(-step.norm(dim=1)) for step in steps])


@pytest.fixture(scope="module")
def rewards(world, flow_folder) -> dict[str, dense.DenseReward]:
    """The flow's reward as the page makes it, and one of a file's kind."""
    names: dict = {}
    code = code_of("flow_reward.py").replace("Qwen/Qwen2.5-Math-1.5B", world.path("model"))
    exec(code.replace("runs/flow-Qwen2.5-Math-1.5B/flow", flow_folder), names)
    return {"flow": names["reward"], "smooth": Smooth(None, None)}


@pytest.fixture(scope="module")
def step_of_trl(world, rewards, tmp_path_factory) -> SimpleNamespace:
    """A step of TRL with the trainer of the page, in which the flow's reward counts."""
    from trl import GRPOConfig

    folder = tmp_path_factory.mktemp("trl")
    seen = SimpleNamespace(parts={})

    class Watched(module_of("dense_grpo.py", folder).DenseGRPOTrainer):
        dense_reward = rewards["flow"]
        settings = dense.DenseSettings(gamma=0.9)

        def run_policy(self, output):
            seen.outcome = output["advantages"]  # (B,) TRL's own
            self.dense_reward = rewards["smooth"]
            seen.parts["smooth"] = super().run_policy(output)
            self.dense_reward = rewards["flow"]
            seen.parts["flow"] = super().run_policy(output)
            return seen.parts["flow"]

        def _generate_and_score_completions(self, inputs):
            seen.output = super()._generate_and_score_completions(inputs)
            return seen.output

    model = AutoModelForCausalLM.from_pretrained(world.path("model"), dtype=torch.float32)
    model.generation_config.eos_token_id = list(range(0, model.config.vocab_size, 6))
    before = [parameter.clone() for parameter in model.parameters()]
    arguments = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=16,
        max_steps=1,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    problems = problems_in(world.path("train.jsonl"))[:8]
    trainer = Watched(
        model,
        reward_funcs=lambda completion_ids, **_: [1.0] * len(completion_ids),
        args=arguments,
        train_dataset=Dataset.from_list([{"prompt": problem.text} for problem in problems]),
        processing_class=find_model_in(world.path("model")).tokenizer,
    )
    trainer.train()
    after = model.parameters()
    pairs = zip(before, after, strict=True)
    seen.has_learnt = any(not torch.equal(old, new) for old, new in pairs)
    return seen


def our_part(output: dict, reward: dense.DenseReward, folder: str) -> dense.MicroBatch:
    """The same tokens as train_rl.py scores them: packed rows, and the policy's own forward."""
    tokens = {}
    for name in ("prompt", "completion"):
        pairs = zip(output[f"{name}_ids"], output[f"{name}_mask"].bool(), strict=True)
        tokens[name] = [ids[mask].tolist() for ids, mask in pairs]
    rows = list(map(batching.Row, tokens["prompt"], tokens["completion"]))
    policy = load_policy(folder)
    batch = batching.collate(rows)
    layers = tap_layers(policy.n_layers, reward.taps)
    with torch.no_grad():
        output = policy(batch, 1.0, layers)
    return dense.MicroBatch(batch, rows, list(range(len(rows))), output, reward.taps)


@pytest.mark.parametrize("name", ["flow", "smooth"])
def test_scores_in_trl_are_our_own(step_of_trl, rewards, world, name):
    reward = rewards[name]
    part = our_part(step_of_trl.output, reward, world.path("model"))
    reward.begin(0, [])
    own, scored = dense.checked_scores(reward, part)
    found, scored_there = dense.checked_scores(reward, step_of_trl.parts[name])
    lengths = scored.sum(dim=1)
    assert len(set(lengths.tolist())) > 1, "rows are padded"
    prompts = step_of_trl.output["prompt_mask"].sum(dim=1)
    assert len(set(prompts.tolist())) > 1, "prompts are padded, on the left"
    assert torch.equal(scored, scored_there)
    assert own.std() > 1e-2
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)


def test_trl_learns_from_the_dense_reward(step_of_trl, rewards, world):
    """Which adds what train_rl.py adds to the outcome advantage. All outcomes are equal here."""
    reward = rewards["flow"]
    part = our_part(step_of_trl.output, reward, world.path("model"))
    reward.begin(0, [])
    score, scored = dense.checked_scores(reward, part)
    settings = dense.DenseSettings(gamma=0.9)
    of_tokens = dense.token_rewards(reward, score.mean(dim=0), scored, settings, 4)
    mask = part.batch.response_mask
    expected = dense.credit(of_tokens, scored, mask, settings, 4, "grpo")
    assert (expected[mask] != 0).float().mean() > 0.2
    assert not step_of_trl.outcome.any()
    torch.testing.assert_close(step_of_trl.output["advantages"], expected, rtol=1e-4, atol=1e-6)
    assert step_of_trl.has_learnt


# ---- verl
@pytest.fixture(scope="module")
def run(world, flow_folder, tmp_path_factory) -> str:
    """A run with two held-out sets; only its settings and its data count here."""
    folder = tmp_path_factory.mktemp("verl") / "run"
    test = world.path("test.jsonl")
    settings = {"prompts": 2, "group_size": 2, "train_batch": 4, "max_tokens": 4, "steps": 1}
    sets = (test, f"b={test}")
    train_rl.main(small_run(world, None, folder, shaping="none", eval_data=sets, **settings))
    return str(folder)


@pytest.fixture(scope="module")
def written(run) -> Path:
    """What run.py has written of its problems."""
    export_problems(run)
    return Path(run, "exports", "verl")


def test_problems_for_verl(written, world):
    """Columns and rows as verl's RLHFDataset reads them, and the tokens that the run sampled from."""
    assert sorted(file.name for file in written.iterdir()) == [
        "eval-b.parquet",
        "eval-test.parquet",
        "train.parquet",
    ]
    source = world.path("train.jsonl")
    problems = problems_in(source)
    rows = load_dataset("parquet", data_files=str(written / "train.parquet"))["train"]
    assert rows.column_names == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert len(rows) == len(problems) == 64
    first, last = problems[0], problems[63]
    assert rows[0] == {
        "data_source": source,
        "prompt": [{"role": "user", "content": first.text}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": first.answer},
        "extra_info": {"split": "train", "index": 0, "id": first.id, "question": first.text},
    }
    assert rows[63]["reward_model"]["ground_truth"] == last.answer
    tokenizer = find_model_in(world.path("model")).tokenizer
    (tokenizer.chat_template,) = re.findall(r"custom_chat_template=\"(.+)\"'", PAGE)
    for row, problem in zip(rows, problems, strict=True):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        assert ids == problem.prompt_ids
    held_out = load_dataset("parquet", data_files=str(written / "eval-b.parquet"))["train"]
    assert held_out[0]["data_source"] == "b" and held_out[0]["extra_info"]["split"] == "test"
    assert (
        held_out[0]["reward_model"]["ground_truth"]
        == problems_in(world.path("test.jsonl"))[0].answer
    )


def test_a_problem_with_several_answers_and_a_template(world, tmp_path):
    """All rows have lists then; the message holds what the template made of the problem."""
    model = find_model_in(world.path("model"))
    template = tmp_path / "template"
    template.write_text("Q{problem}=")
    problems = []
    for text, answer in (("1+1", "2"), ("2+2", ["4", "5"])):
        ids = model.tokenizer(f"Q{text}=", add_special_tokens=False)["input_ids"]
        problems.append(Problem("x", text, answer, ids))
    file = tmp_path / "x.parquet"
    write_problems(problems, "mine", "train", model, str(template), file)
    rows = load_dataset("parquet", data_files=str(file))["train"]
    assert [row["reward_model"]["ground_truth"] for row in rows] == [["2"], ["4", "5"]]
    assert [row["prompt"][0]["content"] for row in rows] == ["Q1+1=", "Q2+2="]
    other = [problem._replace(prompt_ids=[0, *problem.prompt_ids]) for problem in problems]
    with pytest.raises(
        ValueError, match="adds tokens to prompts of --template none, which another"
    ):
        write_problems(other, "mine", "train", model, "none", file)
    with pytest.raises(
        ValueError, match="takes images, which are not written; expected a run of a"
    ):
        write_problems(problems, "mine", "train", model._replace(processor=str), "none", file)


def test_what_is_no_place_for_problems(run, written, tmp_path, world):
    before = (written / "train.parquet").read_bytes()
    with pytest.raises(ValueError, match="verl has files in it, which stay .*--overwrite"):
        export_problems(run)
    export_problems(run, overwrite=True)
    assert (written / "train.parquet").read_bytes() == before
    with pytest.raises(
        ValueError, match="nowhere has no config.json; expected the folder of a run"
    ):
        export_problems("nowhere")


def test_a_run_whose_problems_are_not_there(run, tmp_path):
    settings = json.loads(Path(run, "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()

    def refused(words: str, **changes) -> None:
        (other / "config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(ValueError, match=words):
            export_problems(str(other))
        assert [file.name for file in other.iterdir() if file.is_dir()] == []

    refused(
        "other has no data with problems and answers; expected the folder of a run of", data=None
    )
    refused(
        "no data at '.*gone.jsonl'|gone.jsonl does not exist", data=str(tmp_path / "gone.jsonl")
    )
    refused("its model runs code .*--trust-remote-code", loading={"trust_remote_code": True})
    rows = Path(settings["data"]).read_text().splitlines(keepends=True)
    (tmp_path / "fewer.jsonl").write_text("".join(rows[:5]))
    (other / runs.DATA_FILE).write_text(Path(run, runs.DATA_FILE).read_text())
    refused("has other rows than when the run began", data=str(tmp_path / "fewer.jsonl"))


def test_the_reward_for_verl_grades_as_ours(tmp_path):
    compute_score = module_of("verl_reward.py", tmp_path).compute_score
    for answer, response, expected in (
        ("1/2", r"so \boxed{7}, no, \boxed{0.5}", 1.0),
        ("1/2", r"\boxed{2}", 0.0),
        ("1/2", "0.5", 0.0),
        (["3", "4"], r"\boxed{4}", 1.0),
    ):
        assert compute_score("any", response, answer, extra_info={}) == expected
