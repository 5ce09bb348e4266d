"""Is this answer right? Mathematical answers, option letters, and processes that compare them."""

from grading.answers import Gold, can_be_met
from grading.latex import boxes
from grading.official import MAX_OFFICIAL_BOXES, obeys_official_rules
from grading.options import (
    JOINED_BOXES,
    LABELLED,
    blank,
    extract,
    judge_response,
    letter_in_response,
    option_letter,
    option_letters,
    stated,
    tag_format,
    tagged,
    value,
)
from grading.pool import DEADLINE, Pool

__all__ = [
    "DEADLINE",
    "Gold",
    "JOINED_BOXES",
    "LABELLED",
    "MAX_OFFICIAL_BOXES",
    "Pool",
    "blank",
    "boxes",
    "can_be_met",
    "extract",
    "judge_response",
    "letter_in_response",
    "obeys_official_rules",
    "option_letter",
    "option_letters",
    "stated",
    "tag_format",
    "tagged",
    "value",
]
