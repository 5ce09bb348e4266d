"""The problems of a run in the format of verl, another trainer: see docs/elsewhere.md.

The columns are those that RLHFDataset reads, in verl/utils/dataset/rl_dataset.py of volcengine/verl.
"""

from collections.abc import Sequence
from pathlib import Path

from infra.data import Problem, apply_template
from infra.models import Model


def write_problems(
    problems: Sequence[Problem], source: str, split: str, model: Model, template: str, file: Path
) -> None:
    """Write problems as a Parquet file.

    A prompt is one message that holds all of it, as the template made it.

    source: what the column data_source says
    split: what extra_info says, train or test
    Errors as of whole_prompts.
    """
    import datasets

    has_lists = any(isinstance(problem.answer, list) for problem in problems)
    rows = []
    for index, prompt in enumerate(whole_prompts(problems, model, template)):
        id_, text, answer, *_ = problems[index]
        if has_lists and not isinstance(answer, list):
            answer = [answer]  # a column has one type
        rows.append(
            {
                "data_source": source,
                "prompt": [{"role": "user", "content": prompt}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": answer},
                "extra_info": {"split": split, "index": index, "id": id_, "question": text},
            }
        )
    datasets.Dataset.from_list(rows).to_parquet(file)


def whole_prompts(problems: Sequence[Problem], model: Model, template: str) -> list[str]:
    """Return the prompts of problems as texts, of which other trainers make the same tokens.

    ValueError if no text does: problems have images, or the tokenizer adds tokens by itself.
    """
    if model.processor is not None:
        raise ValueError(
            f"{model.path} takes images, which are not written; expected a run of a language model"
        )
    prompts = apply_template([problem.text for problem in problems], model.tokenizer, template)
    ids = model.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    if ids != [problem.prompt_ids for problem in problems]:
        raise ValueError(
            f"the tokenizer of {model.path} adds tokens to prompts of --template {template}, which "
            "another trainer would leave out; expected a run whose template writes them itself"
        )
    return prompts
