"""A question of a vision-language benchmark, as its file and its judge know it."""

from typing import Literal, NamedTuple

QuestionType = Literal["choice", "letters", "list", "free"]
Row = dict[str, str]  # a line of a TSV file, by column


class Question(NamedTuple):
    """A row of a benchmark, ready to be asked and scored."""

    index: str
    prompt: str  # with `<image>` where an image goes
    images: tuple[bytes, ...]  # PNG or JPEG files
    gold: str  # a letter, several letters in order, a list such as `[1, 2]`, or a text
    choices: dict[str, str]  # letter -> text, empty where the image shows it; {} without options
    type: QuestionType
    row: Row  # all columns but the image
