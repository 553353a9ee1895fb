"""Distinct texts of known length, made from a word list of our own: the same seed gives the same texts everywhere."""

import random
from collections.abc import Callable, Sequence

# Each is one token of the usual English WordPiece vocabularies, so a text has as many tokens as words, and two markers.
_LIST = """
river stone garden window letter market summer winter bridge mountain village teacher doctor engine signal paper
coffee butter silver golden copper forest valley island harbor captain soldier farmer painter singer writer reader
question answer reason method theory result figure number measure weight height length distance speed pressure
temperature water fire earth metal glass wood cotton leather sugar salt bread fruit apple orange lemon wheat rice
horse cattle sheep chicken rabbit tiger eagle snake spider insect flower branch root seed leaf grass cloud storm
thunder rain snow wind light shadow color sound music voice silence memory dream story history science nature
culture language grammar word sentence page book library school college student lesson exam paper pencil table
chair door wall floor roof kitchen bedroom street road highway railway station train plane ship boat wheel motor
battery cable circuit computer screen keyboard network server storage program system process control machine tool
hammer knife needle thread cloth dress jacket shirt pocket button mirror clock calendar morning evening night week
month year century money price value trade profit debt bank credit office worker manager company factory product
open close begin finish carry build break repair push pull lift drop throw catch follow lead travel return
small large early late quick slow heavy warm cold bright dark clean empty full narrow wide deep shallow quiet
"""
WORDS = tuple(_LIST.split())
MARKERS = 2  # Tokens that the tokenizer puts around a text.

SHORT_TOKENS = 10
LONG_TOKENS = 130


def texts(count: int, tokens: int, seed: int) -> list[str]:
    """Return *count* distinct texts of *tokens* tokens each, markers included; *seed* decides which. Order is theirs."""
    words = tokens - MARKERS
    if words < 1 or count > len(set(WORDS)) ** words / 2:
        raise ValueError(f"There are not {count} distinct texts of {tokens} tokens")
    draw = random.Random(f"{seed}/{tokens}")
    made: dict[str, None] = {}
    while len(made) < count:
        made[" ".join(draw.choices(WORDS, k=words))] = None
    return list(made)


def mixed_texts(count: int, seed: int, *, shortest: int = 6, longest: int = 250) -> list[str]:
    """Return *count* texts whose lengths in tokens are spread as documents' are: many short ones, few long ones."""
    draw = random.Random(f"{seed}/mixed")
    lengths = [round(shortest * (longest / shortest) ** draw.random()) for _ in range(count)]
    return [" ".join(draw.choices(WORDS, k=length - MARKERS)) for length in lengths]


def check_lengths(made: Sequence[str], tokens: int, count_tokens: Callable[[str], int]) -> None:
    """Raise ValueError when a text of *made* has another length, by the model's own tokenizer, than *tokens* ± 10 %."""
    for text in made:
        counted = count_tokens(text)
        if abs(counted - tokens) > tokens * 0.1:
            raise ValueError(f"{text!r} has {counted} tokens, not {tokens}: the model's vocabulary lacks these words")


def model_token_counter(directory: str) -> Callable[[str], int]:
    """Return how many tokens, markers included, the tokenizer in a model's *directory* makes of a text."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(f"{directory}/tokenizer.json")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda text: len(tokenizer.encode(text).ids)
