"""Rollouts as a record: what a step computed of some episodes, one JSON object an episode.

    runs/NAME/rollouts/step-N.jsonl      inspector.py shows them, benchmarks/behaviour.py counts

An episode has
    step group sample          where it comes from; group counts the step's problems
    problem question answer    the problem's id, text and right answer
    prompt images              the prompt as text, and where its images are: they are not copied
    response finish_reason     the response as text without special tokens, and how it ended
    reward parts correct verdict extracted text    what the verdict says, see rewards.py
    taps                       indices of the tapped layers
    token_ids tokens           of the response; tokens are texts, which together are the response
    logp entropy flow_reward advantage ratio       a number for each token of the response
    deviation                  for each tap a number for each token, whose mean is the flow's score
ratio is the trainer's probability of a token over the sampler's. Numbers have six digits; null
stands for a number that is not there: a token without a context has no deviation.

A token takes about 100 bytes. A file holds at most log_groups * group_size * max_tokens of them.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import vision
from infra.files import need_keys, read_json_lines

BYTES_PER_TOKEN = 100  # of a file, about: ten numbers and a text
BROKEN = "\ufffd"  # what a decoder puts for bytes that are no character
BYTES_OF_A_CHARACTER = 4  # at most, in UTF-8
FOLDER = "rollouts"  # in a run's folder


def is_due(step: int, total_steps: int, every: int) -> bool:
    """Return whether a step's rollouts are written: every so many steps, and those of the last."""
    if not every:
        return False
    return step % every == 0 or step + 1 == total_steps


def describe_size(total_steps: int, every: int, n_episodes: int, max_tokens: int) -> str:
    """Return a line on how large the rollouts of a run can become."""
    n_files = sum(is_due(step, total_steps, every) for step in range(total_steps))
    largest = n_episodes * max_tokens * BYTES_PER_TOKEN / 1e6
    return (
        f"rollouts of {n_files} steps go to {FOLDER}/, {n_episodes} episodes each: "
        f"at most about {largest:.1f} MB a step, {n_files * largest:.0f} MB in all"
    )


# ---- Writing
def describe(
    step: int,
    episodes: Sequence,
    verdicts: Sequence,
    per_token: dict[str, Tensor],
    deviation: Tensor,
    taps: Sequence[int],
    tokenizer,
    group_size: int,
) -> list[dict]:
    """Return the records of a step's first episodes.

    step: counted from 0; records count from 1, as metrics do
    episodes, verdicts: as many as there are to be records, `group_size` in a row for a problem
    per_token: (B, T) each, of all episodes of the step
    deviation: (L, B, T), NaN where there is none
    taps: layer indices, L of them
    """
    n_episodes = len(episodes)
    numbers = {name: values[:n_episodes].tolist() for name, values in per_token.items()}
    by_tap = deviation[:, :n_episodes].tolist()
    records = []
    for i, (episode, verdict) in enumerate(zip(episodes, verdicts, strict=True)):
        length = len(episode.response_ids)
        records.append(
            {
                "step": step + 1,
                "group": i // group_size,
                "sample": i % group_size,
                **describe_problem(episode, tokenizer),
                "response": episode.text,
                "finish_reason": episode.finish_reason,
                "reward": verdict.reward,
                "parts": verdict.parts,
                "correct": verdict.correct,
                "verdict": verdict.kind,
                "extracted": verdict.extracted,
                "text": verdict.text,
                "taps": list(taps),
                "token_ids": episode.response_ids,
                "tokens": token_texts(tokenizer, episode.response_ids),
                **{name: shorten(rows[i][:length]) for name, rows in numbers.items()},
                "deviation": [shorten(rows[i][:length]) for rows in by_tap],
            }
        )
    return records


def describe_problem(episode, tokenizer) -> dict:
    """Return the part of a record that tells the problem."""
    problem = episode.problem
    images = []
    for number, image in enumerate(episode.images):
        is_file = isinstance(image.source, str)
        images.append(image.source if is_file else f"image {number} of problem {problem.id}")
    prompt_ids = episode.prompt_ids
    if episode.images:
        prompt_ids = vision.collapse(prompt_ids, tokenizer.convert_tokens_to_ids(vision.PAD))
    return {
        "problem": problem.id,
        "question": problem.text,
        "answer": problem.answer,
        "prompt": tokenizer.decode(prompt_ids),
        "images": images,
    }


def shorten(numbers: Sequence[float]) -> list[float | None]:
    """Return numbers with six significant digits; None for those that are not finite."""
    return [float(f"{x:.6g}") if math.isfinite(x) else None for x in numbers]


def token_texts(tokenizer, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, special ones included; together they are the response.

    A character may consist of several tokens: the last one of them has the character, and the
    others have an empty text. Bytes that are no character are U+FFFD, likewise.
    """
    single = {token: text_of_token(tokenizer, token) for token in set(ids)}
    texts = [single[token] for token in ids]
    first = 0  # token after the last whole character
    part = 0  # token in which the last broken character begins
    for end, text in enumerate(texts):
        if BROKEN not in text:
            first = part = end + 1
            continue
        start = find_character(tokenizer, ids, first, end)
        if start is not None:
            first = part = end + 1
        elif end > part and decode(tokenizer, ids[part : end + 1]) != texts[end - 1] + text:
            start = part  # the token goes on with the broken character
        else:
            part = end
        if start is not None:
            texts[start:end] = [""] * (end - start)
            texts[end] = decode(tokenizer, ids[start : end + 1])
    return texts


def find_character(tokenizer, ids: Sequence[int], first: int, end: int) -> int | None:
    """Return where the character begins that token `end` completes, `first` or later; or None."""
    for start in range(max(first, end + 1 - BYTES_OF_A_CHARACTER), end):
        if BROKEN not in decode(tokenizer, ids[start : end + 1]):
            return start
    return None


def decode(tokenizer, ids: Sequence[int]) -> str:
    """Return the text of tokens as it is, without what some tokenizers tidy up in it."""
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def text_of_token(tokenizer, token: int) -> str:
    """Return the text of one token; a decoder of a lone token may drop the space before a word."""
    text = decode(tokenizer, [token])
    piece = tokenizer.convert_ids_to_tokens(token) or ""
    if piece.startswith("▁") and not text.startswith(" "):
        return f" {text}"
    return text


def summary_rows(records: Sequence[dict]) -> tuple[list[str], list[list]]:
    """Return columns and rows of a table of episodes, for those who follow a run elsewhere."""
    columns = ["problem", "sample", "question", "response", "answer", "extracted", "verdict"]
    columns += ["reward", "finish_reason"]
    rows = []
    for one in records:
        row = [one[column] for column in columns]
        row += [len(one["tokens"]), mean(one["entropy"]), sum(one["flow_reward"])]
        row.append(mean([mean(values) for values in one["deviation"]]))
        rows.append(row)
    return [*columns, "tokens", "entropy", "flow reward", "deviation"], rows


def mean(numbers: Sequence[float | None]) -> float | None:
    """Return the mean of the numbers that are there; None if none is."""
    known = [x for x in numbers if x is not None]
    return sum(known) / len(known) if known else None


# ---- Reading
def find_files(run: str | Path) -> dict[int, Path]:
    """Return the files of a run's rollouts by step, the first one first."""
    found = {}
    for path in Path(run, FOLDER).glob("step-*.jsonl"):
        match = re.fullmatch(r"step-(\d+)", path.stem)
        if match:
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def need_files(run: str | Path) -> dict[int, Path]:
    """Return the files of a run's rollouts by step, the first one first; ValueError if none."""
    found = find_files(run)
    if not found:
        raise ValueError(
            f"{run} has no {FOLDER}/step-N.jsonl; expected the folder of a run of train_rl.py "
            "with --log-rollouts 1 or more"
        )
    return found


def read(path: Path) -> list[dict]:
    """Read the records of a step."""
    records = read_json_lines(path, "a rollout a line")
    need_keys(records, path, ["step", "group", "response", "reward", "taps", "tokens"])
    if not records:
        raise ValueError(f"{path} is empty; expected the rollouts of a step: remove it")
    return records
