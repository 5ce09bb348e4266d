"""Problems, templates, and the torch engine against Hugging Face's own generation."""

import json
import math

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import (
    FAMILIES,
    find_model_in,
    plain_model,
    problems_in,
    requests,
    tiny_model,
    torch_engine,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig

import eval as evaluation
import rollout
from engines import vllm_engine
from engines.choice import make_engine
from engines.common import end_tokens
from engines.torch_engine import choose
from infra.data import DataSettings, ProblemSettings, load_problems, load_rows, make_prompts
from infra.defaults import choose_template, fill_in
from infra.settings import change
from infra.solutions import SolutionSettings, load_solutions
from rollout import Sampling


@pytest.fixture(scope="module")
def tokenizer(world):
    return AutoTokenizer.from_pretrained(world.path("model"))


@pytest.fixture(scope="module")
def engine(world, tokenizer):
    return torch_engine(world.path("model"))


@pytest.fixture(scope="module")
def prompts(world, tokenizer):
    return [problem.prompt_ids for problem in problems_in(world.path("test.jsonl"))]


ROWS = [{"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"}]


# ---- Problems


def test_every_kind_of_data_gives_the_same_rows(tmp_path):
    lines = tmp_path / "data.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(tmp_path / "data.parquet")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "dict")
    (tmp_path / "folder").mkdir()
    data.to_parquet(tmp_path / "folder" / "train.parquet")
    for name in ("data.jsonl", "data.parquet", "saved", "dict", "folder"):
        assert load_rows(str(tmp_path / name), ("problem", "answer"), "train", None) == ROWS, name


def test_a_split_stands_after_its_data(world, tmp_path):
    """In training and in the offline start, as in evaluation; by default it is train."""
    splits = {}
    for name, n in (("train", 3), ("easy", 2)):
        rows = [{"problem": f"{i}+1>", "answer": "1", "solution": name} for i in range(n)]
        splits[name] = datasets.Dataset.from_list(rows)
    folder = str(tmp_path / "dict")
    datasets.DatasetDict(splits).save_to_disk(folder)
    model = find_model_in(world.path("model"))
    common = {"problem_column": "problem", "template": "none", "max_prompt_tokens": 64}
    settings = ProblemSettings(**common)
    solution_settings = SolutionSettings(**common, cutoff=100)
    for data, n in ((folder, 3), (f"{folder}:train", 3), (f"{folder}:easy", 2)):
        assert len(load_problems(data, settings, model)) == n
        assert len(load_solutions(data, solution_settings, model)) == n
    with pytest.raises(ValueError, match="no data at .*dict' .split 'hard'"):
        load_problems(f"{folder}:hard", settings, model)
    file = world.path("train.jsonl")
    for load, of in ((load_problems, settings), (load_solutions, solution_settings)):
        with pytest.raises(ValueError, match=f"{file} has no splits; leave out :easy"):
            load(f"{file}:easy", of, model)
        with pytest.raises(ValueError, match="ORG/NAME/x.jsonl has no splits; leave out :easy"):
            load("ORG/NAME/x.jsonl:easy", of, model)


def unreadable(n: int) -> pyarrow.Array:
    """A column of texts that cannot become Python's: they are not UTF-8."""
    offsets = pyarrow.py_buffer(np.arange(n + 1, dtype=np.int32))
    return pyarrow.Array.from_buffers(
        pyarrow.string(), n, [None, offsets, pyarrow.py_buffer(b"\xff" * n)]
    )


def test_columns_that_nobody_needs_do_not_become_python_objects(tmp_path, world):
    """Regression: each rank made objects of all columns, for some published data gigabytes."""
    rows = [{"id": "a", "problem": "1+1>", "answer": "2", "solution": "It is 2"}] * 3
    table = pyarrow.Table.from_pylist(rows)
    for name in ("messages", "generations", "image"):
        table = table.append_column(name, unreadable(len(rows)))
    file = str(tmp_path / "data.parquet")
    pyarrow.parquet.write_table(table, file)
    model = find_model_in(world.path("model"))
    common = {"template": "none", "problem_column": "problem", "max_prompt_tokens": 64}
    problems = load_problems(file, ProblemSettings(**common), model)
    assert [(problem.id, problem.answer) for problem in problems] == [("a", "2")] * 3
    settings = SolutionSettings(**common, cutoff=100)
    solutions = load_solutions(file, settings, model)
    decoded = model.tokenizer.decode(solutions[2].response_ids, skip_special_tokens=True)
    assert decoded == "It is 2"
    with pytest.raises(UnicodeDecodeError):  # such a column cannot be read at all
        load_rows(file, ("generations",), "train", None)


def test_an_answer_may_be_a_list_or_a_number(tmp_path, world):
    file = tmp_path / "data.jsonl"
    file.write_text('{"q": "a\\u2028", "gold": ["1", 2]}\n{"q": "b", "gold": 3}\n')
    settings = ProblemSettings(
        template="none", problem_column="q", answer_column="gold", max_prompt_tokens=64
    )
    problems = load_problems(str(file), settings, find_model_in(world.path("model")))
    assert [problem.answer for problem in problems] == [["1", "2"], "3"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no rows; expected at least one problem"),
        (
            '{"problem": "a", "answer": "1"}\nnot json\n',
            "'not json.*' is not JSON .* expected one object a line",
        ),
        (
            '{"question": "a", "answer": "1"}\n',
            r"no column 'problem', only \['answer', 'question'\]; name it with a --…-column",
        ),
        (
            '{"problem": "a", "answer": "1"}\n{"problem": "b", "answer": ""}\n',
            "'answer' of .* is empty in 1 of 2 rows, first in row 1",
        ),
        (
            '{"problem": "a", "answer": "1"}\n{"problem": "b"}\n',
            "'answer' of .* is empty in 1 of 2 rows",
        ),
    ],
)
def test_bad_data(tmp_path, content, words):
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=words):
        load_rows(str(file), ("problem", "answer"), "train", None)


def test_benchmarks_of_eval_are_not_data_to_train_on():
    with pytest.raises(
        ValueError, match="x.tsv: a TSV file is a vision-language benchmark for eval"
    ):
        load_rows("x.tsv", ("problem",), "train", None)


@pytest.mark.parametrize("name", ["x.txt", "x", "x.jsonl.gz"])
def test_a_file_of_no_known_format_is_not_looked_for_on_the_hub(tmp_path, name):
    """Half a minute of attempts to reach a repository `txt`, where there is no network."""
    (tmp_path / name).write_text("text")
    with pytest.raises(ValueError, match=f"{name}: no format .* ends in .json, .jsonl, .csv"):
        load_rows(str(tmp_path / name), (), "train", None)


def test_unknown_data_and_models():
    for source in ("nowhere/at/all.jsonl", "nobody/nothing"):
        with pytest.raises(
            ValueError,
            match=f"no data at '{source}'.*expected a JSONL or Parquet file, a folder or a hub id",
        ):
            load_rows(source, (), "train", None)
    for model, tried in {"Qwen9-1B": "Qwen/Qwen9-1B", "./missing": "./missing"}.items():
        with pytest.raises(
            ValueError,
            match=f"model '{model}': '{tried}' cannot be loaded.*a short name such as Qwen2.5-7B",
        ):
            find_model_in(model)


def test_long_prompts_are_counted(world):
    with pytest.raises(
        ValueError,
        match="2 of 3 prompts are longer than 4 tokens, e.g. row 1 with 5, 'abcde'; raise --max-prompt-tokens",
    ):
        make_prompts(
            ["abc", "abcde", "abcdef"],
            [(), (), ()],
            find_model_in(world.path("model")),
            DataSettings(template="none", max_prompt_tokens=4),
        )


def test_templates(world, tokenizer, tmp_path):
    def text(template, model_type=""):
        model = find_model_in(world.path("model"))._replace(tokenizer=tokenizer)
        model.config.model_type = model_type
        template = choose_template(template, model)
        settings = DataSettings(template=template, max_prompt_tokens=300)
        return tokenizer.decode(make_prompts(["1+1?"], [()], model, settings)[0])

    assert text("none") == "1+1?"
    assert text("qwen").startswith("<|im_start|>system\nPlease reason") and text("qwen").endswith(
        "<|im_start|>assistant\n"
    )
    assert text("auto", model_type="qwen2_5") == text("qwen")
    assert text("auto", model_type="llama") == "1+1?", "a llama without the tokens of Llama 3"
    assert text("auto", model_type="gemma") == "1+1?", "no family and no chat template"
    own = tmp_path / "own.txt"
    own.write_text("Q: {problem}\nA:")
    assert text(str(own)) == "Q: 1+1?\nA:"
    own.write_text("Q:")
    for template, words in {
        str(own): "no {problem} in it",
        "vicuna": "neither qwen, qwen_tag, llama, none",
        "chat": "has no chat template",
    }.items():
        with pytest.raises(ValueError, match=words):
            text(template)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"
    )
    try:
        assert text("chat").startswith("[user]1+1?\nPlease reason") and text(
            "auto", model_type="gemma"
        ) == text("chat")
    finally:
        tokenizer.chat_template = None


# ---- Engine


def test_the_models_eos_alone_can_end_a_response(world):
    """As officially; by default the ends of turns do, too."""
    model = find_model_in(world.path("model"))
    vocabulary = model.tokenizer.get_vocab()
    eos = vocabulary["<|im_end|>"]
    assert end_tokens(model) == sorted({eos, vocabulary["<|endoftext|>"]})
    assert end_tokens(model, "eos") == [eos]
    settings = rollout.EngineSettings(engine="torch", stop_tokens="eos")
    engine = make_engine(
        model,
        settings,
        rollout.Capacity(64),
        torch.device("cpu"),
        torch.float32,
        can_sleep=False,
    )
    assert engine.end_tokens.tolist() == [eos]


def test_greedy_is_what_hugging_face_generates(engine, prompts, tokenizer):
    episodes = engine.generate(requests(prompts), Sampling(temperature=0, max_tokens=24))
    for prompt, episode in zip(prompts, episodes, strict=True):
        expected = engine.model.generate(
            torch.tensor([prompt]),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=engine.end_tokens.tolist(),
        )[0, len(prompt) :]
        assert episode.prompt_ids == prompt and episode.response_ids == expected.tolist()
        assert (episode.finish_reason == "stop") == (episode.response_ids[-1] in engine.end_tokens)
        assert tokenizer.eos_token not in episode.text


def test_samples_do_not_depend_on_the_batch(engine, prompts):
    sampling, seeds = Sampling(n=3, max_tokens=24), [100 * i for i in range(len(prompts))]
    together = engine.generate(requests(prompts, seeds), sampling)
    alone = [
        episode
        for prompt, seed in zip(prompts, seeds, strict=True)
        for episode in engine.generate(requests([prompt], [seed]), sampling)
    ]
    assert [episode.response_ids for episode in together] == [
        episode.response_ids for episode in alone
    ]
    assert len({tuple(episode.response_ids) for episode in together}) > len(prompts)
    single = engine.generate(requests(prompts[:1], [2]), Sampling(n=1, max_tokens=24))[0]
    assert single.response_ids == together[2].response_ids, "child i of a prompt has the seed + i"


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_the_trainer(engine, prompts, policy, temperature):
    from infra import batching

    episodes = engine.generate(
        requests(prompts, range(0, 9 * len(prompts), 9)),
        Sampling(n=2, temperature=temperature, max_tokens=24),
    )
    logp = policy(batching.collate(episodes), temperature).logp
    for row, episode in enumerate(episodes):
        torch.testing.assert_close(
            torch.tensor(episode.logp),
            logp[row, : len(episode.logp)].detach(),
            rtol=1e-4,
            atol=2e-5,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_samples_from_its_own_distribution(family, tokenizer, tmp_path):
    """Prompts of several lengths, padded on the left; rows leave at different times."""
    changes = {"vocab_size": len(tokenizer), "pad_token_id": None, "eos_token_id": None}
    tiny_model(family, **changes).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = torch_engine(tmp_path)
    engine.end_tokens = torch.arange(40)
    prompts = [[65, 66, 67, 68, 69, 70, 71], [72], [73, 74, 75]]
    episodes = engine.generate(requests(prompts, [3, 33, 333]), Sampling(n=3, max_tokens=12))
    assert len({len(episode.response_ids) for episode in episodes}) > 2
    plain = plain_model(family, **changes)
    for episode in episodes:
        ids = torch.tensor([episode.prompt_ids + episode.response_ids])
        with torch.no_grad():
            logits = plain(ids).logits[0, len(episode.prompt_ids) - 1 : -1]
        words = torch.tensor(episode.response_ids)[:, None]
        expected = logits.log_softmax(dim=-1).gather(1, words).squeeze(1)
        torch.testing.assert_close(torch.tensor(episode.logp), expected, rtol=0, atol=1e-4)


def test_a_model_that_ignores_the_cache_is_refused(tokenizer, tmp_path):
    """Regression: each token was sampled as if the prompt had never been."""
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot sample from MambaForCausalLM.*take --engine vllm"):
        torch_engine(tmp_path)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([0.5, 2.0, 1.0, -1.0]).log_softmax(dim=0)
    uniform = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def frequencies(**options):
        token, logp = choose(logits.expand(len(uniform), 4), uniform, Sampling(**options))
        p = token.bincount(minlength=4) / len(uniform)
        torch.testing.assert_close(
            logp.exp().double().mean(), (p * p).double().sum(), rtol=0.05, atol=0.01
        )
        return p

    torch.testing.assert_close(frequencies(), logits.exp(), atol=0.01, rtol=0)
    torch.testing.assert_close(
        frequencies(temperature=0.5), (logits / 0.5).softmax(dim=0), atol=0.01, rtol=0
    )
    p = frequencies(top_p=0.7)
    assert p[0] == p[3] == 0 and p[1] > p[2] > 0
    assert frequencies(top_p=0.1)[1] == 1


def test_length_finish_and_weights(engine, prompts, world, tokenizer):
    episodes = engine.generate(requests(prompts), Sampling(max_tokens=2))
    assert all(
        e.finish_reason == "length" and len(e.response_ids) == 2
        for e in episodes
        if e.response_ids[-1] != tokenizer.eos_token_id
    )
    other = torch_engine(world.path("model"))
    other.sleep()
    state = {name: torch.zeros_like(tensor) for name, tensor in other.model.state_dict().items()}
    other.load_weights(state.items())
    assert all(tensor.abs().max() == 0 for tensor in other.model.state_dict().values())
    with pytest.raises(
        ValueError, match="weight 'model.nonsense' is not one of the engine's model"
    ):
        other.load_weights([("model.nonsense", torch.zeros(1))])
    with pytest.raises(
        ValueError, match="weights were not given, e.g. .*expected the whole state dict"
    ):
        other.load_weights(list(state.items())[:3])


# ---- vLLM's options


def test_the_cache_by_hand(world):
    """Room for all sequences, or a share of what is free; too little for one is an error."""
    model = find_model_in(world.path("model"))
    model.config.update({"num_key_value_heads": 2, "head_dim": 16})  # of 3 layers
    token_bytes = 2 * 3 * 2 * 16 * 4  # keys and values, layers, heads, their size, float32
    sequence_bytes = (72 + 128) * token_bytes

    def cache_bytes(free: float, **settings) -> int:
        settings = rollout.EngineSettings(max_sequences=10, cache_share=0.5, **settings)
        return vllm_engine.cache_bytes(model, settings, 72, torch.float32, free)

    assert cache_bytes(math.inf) == cache_bytes(40 * sequence_bytes) == 10 * sequence_bytes
    assert cache_bytes(8 * sequence_bytes) == 4 * sequence_bytes
    assert cache_bytes(math.inf, tensor_parallel=2) == 5 * sequence_bytes
    # four ranks share two heads: each holds a whole one
    assert cache_bytes(math.inf, tensor_parallel=4) == 5 * sequence_bytes
    with pytest.raises(
        ValueError, match="of 72 tokens needs 0.00 GB of KV cache.*give --offload sampling"
    ):
        cache_bytes(sequence_bytes)


def test_ranks_that_cannot_share_the_heads(world):
    config = change(evaluation.Config(), tensor_parallel=2)
    words = "tensor_parallel=2 does not divide the model's 1 attention heads"
    with pytest.raises(ValueError, match=words):
        fill_in(config, find_model_in(world.path("model")))


def test_what_differs_on_a_gpu():
    """Chunks of prompts are off on a CPU alone; only an engine that sleeps takes vLLM's pool."""
    cpu = vllm_engine.device_options(torch.device("cpu"), can_sleep=True)
    assert cpu == {"enforce_eager": True, "enable_chunked_prefill": False}
    gpu = torch.device("cuda", 0)
    assert vllm_engine.device_options(gpu, can_sleep=True) == {"enable_sleep_mode": True}
    assert vllm_engine.device_options(gpu, can_sleep=False) == {"enable_sleep_mode": False}
