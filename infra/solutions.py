"""Expert solutions: problems with their solutions, or the first exchanges of chats, as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from infra import batching
from infra.data import (
    DataSettings,
    check_columns,
    choose_split,
    find_exchange,
    is_empty,
    load_rows,
    make_prompts,
    read_exchange,
    read_images,
    solution_end,
)
from infra.models import Model
from infra.parallel import is_first
from infra.ranges import PositiveInt
from infra.rows import check_texts

CHAT_COLUMNS = ("messages", "conversations")


@dataclass(frozen=True)
class SolutionSettings(DataSettings):
    """Where expert solutions stand, and how problems become prompts."""

    # Column with the solution's text; messages or conversations: the first answer of a chat
    solution_column: str = "solution"
    drop_empty: bool = False  # Leave out rows without a problem or a solution, and say how many
    # Longest prompt + solution in tokens, longer ones are cut; by default 8192, for VL models 16384
    cutoff: PositiveInt | None = None


def load_solutions(source: str, settings: SolutionSettings, model: Model) -> list[batching.Row]:
    """Load expert solutions as tokens; a whole one ends as a turn does, a cut one does not."""
    return tokenise(*read_solutions(source, settings, model), settings, model)


def read_solutions(
    data: str, settings: SolutionSettings, model: Model
) -> tuple[list[str], list[str], list]:
    """Read problems, their solutions and their images, in the order of the rows."""
    source, split = choose_split(data, "train")
    rows = load_rows(source, (), split, settings.subset)
    columns = (settings.problem_column, settings.solution_column)
    is_chat = takes_chats(rows[0], settings.solution_column)
    if settings.drop_empty:
        rows = drop_empty(rows, source, None if is_chat else columns)
    if is_chat:
        exchanges = [read_exchange(row, f"{source}, row {i}") for i, row in enumerate(rows)]
        texts = [problem for problem, _ in exchanges]
        solutions = [solution for _, solution in exchanges]
    else:
        check_columns(rows, source, columns)
        texts = [row[settings.problem_column] for row in rows]
        solutions = [row[settings.solution_column] for row in rows]
    check_texts(texts, source, settings.problem_column)
    check_texts(solutions, source, settings.solution_column)
    return texts, solutions, read_images(rows, source, settings, model.processor)


def tokenise(
    texts: Sequence[str],
    solutions: Sequence[str],
    images: Sequence,
    settings: SolutionSettings,
    model: Model,
) -> list[batching.Row]:
    """Return solutions as tokens, after their prompts."""
    prompts = make_prompts(texts, images, model, settings)
    ids = model.tokenizer(solutions, add_special_tokens=False)["input_ids"]
    end = solution_end(model, settings.template)
    episodes = []
    for i, prompt in enumerate(prompts):
        solution = ids[i] + end
        room = settings.cutoff - len(prompt)
        episodes.append(batching.Row(prompt, solution[:room], images[i]))
    return episodes


def takes_chats(row: Mapping, column: str) -> bool:
    """Return whether solutions are answers of chats; say so if the rows have both."""
    chats = [name for name in CHAT_COLUMNS if name in row]
    if chats and column in row and column not in chats and is_first():
        print(
            f"solutions come from the column {column!r}, not from the chats in {chats[0]!r}, "
            f"which --solution-column {chats[0]} would take"
        )
    return column in CHAT_COLUMNS or (bool(chats) and column not in row)


def drop_empty(
    rows: Sequence[Mapping], source: str, columns: Sequence[str] | None
) -> list[Mapping]:
    """Return the rows with something in all columns, or with a whole exchange; say how many."""
    kept = []
    for row in rows:
        if columns is None:
            is_whole = find_exchange(row) is not None
        else:
            is_whole = not any(is_empty(row.get(column)) for column in columns)
        if is_whole:
            kept.append(row)
    if not kept:
        raise ValueError(
            f"none of the {len(rows)} rows of {source} has a problem and a solution; name their "
            "columns with --problem-column and --solution-column"
        )
    if is_first():
        print(f"{len(rows) - len(kept)} of {len(rows)} rows of {source} are left out: empty")
    return kept
