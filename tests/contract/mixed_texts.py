"""Texts of every length, in several scripts, for comparing what two backends make of them."""

import math
import random

WORDS = [
    "the",
    "quick",
    "fox",
    "naïve",
    "café",
    "東京",
    "都市",
    "Москва",
    "القاهرة",
    "दिल्ली",
    "12,345.67",
    "{json:",
    "🙂",
    "retrieval",
    "systems",
    "answer",
    "questions",
    "Überraschung",
    "ελληνικά",
    "한국어",
    "x=y+1",
    "<tag>",
    "https://example.org/a?b=c",
]


def mixed_texts(count: int) -> list[str]:
    """Return *count* texts of 1 to over 600 tokens, short ones being as many as long ones, in several scripts."""
    rng = random.Random(3)
    lengths = [round(math.exp(rng.uniform(0, math.log(330)))) for _ in range(count)]
    return [" ".join(rng.choice(WORDS) for _ in range(length)) + f" {index}" for index, length in enumerate(lengths)]
