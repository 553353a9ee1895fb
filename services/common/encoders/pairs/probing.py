"""Finds out how a cross-encoder puts a query and a document together, from what its own library makes of samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.common.encoders.pairs.form import Fixed, PairForm, PairTokenizer
from services.common.encoders.tokenizer import TextTokenizer
from services.common.model_errors import InvalidModel

SAMPLES = (
    ("What do plants need?", "Light and water."),
    ("one", "two"),
    ("Naïve café, 12 €", "A sentence. Then a part of one"),
)
_UNBOUND = 1 << 20
_QUERY, _DOCUMENT = "first sample", "second thing"
# Settings of a chat template's call that are not the template's own.
_NOT_THE_TEMPLATES = frozenset({"restore_suffix", "padding", "truncation", "max_length", "return_tensors"})

# From the model card of Qwen3-Reranker, for its files as first published: their own template knows no documents.
# https://huggingface.co/Qwen/Qwen3-Reranker-0.6B
QWEN_TEMPLATE = """<|im_start|>system
Judge whether the Document meets the requirements based on the Query and the Instruct provided. Note that the answer \
can only be "yes" or "no".<|im_end|>
<|im_start|>user
<Instruct>: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first \
| default("Given a web search query, retrieve relevant passages that answer the query") }}
<Query>: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
<Document>: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}<|im_end|>
<|im_start|>assistant
<think>

</think>{{ "\n\n" }}"""


def find_form(model: Any, tokenizer: TextTokenizer, directory: Path) -> PairForm:
    """
    Return how *model*, a sentence-transformers CrossEncoder, reads pairs; *tokenizer* is its own.

    A Qwen3 whose chat template has no place for documents is given Qwen3-Reranker's.

    Raises:
        InvalidModel: It does not read pairs of texts, or not as tokens of one followed by tokens of the other.
    """
    transformer, prompt = model[0], _prompt(model)
    if "message" in transformer.modality_config:
        failure = _pair_roles_failure(transformer)
        if failure and transformer.config.model_type == "qwen3" and "<|im_start|>" in transformer.tokenizer.get_vocab():
            transformer.processor.chat_template = QWEN_TEMPLATE
            transformer.input_formatter.message_format = "flat"
        elif failure:
            raise InvalidModel(
                f"{directory} cannot be given pairs: its chat template has no query and document: {failure}"
            )
        form = _by_chat_template(transformer, tokenizer, prompt, directory)
    else:
        form = _by_ids(transformer, tokenizer, prompt, directory)
    _check(transformer, PairTokenizer(tokenizer, form, max_tokens=_UNBOUND), prompt, directory)
    return form


def _prompt(model: Any) -> str:
    name = model.default_prompt_name
    return str(model.prompts.get(name) or "") if name is not None else ""


def _encoded(transformer: Any, sample: Sequence[str] | str, prompt: str) -> tuple[list[int], list[int] | None]:
    """Return the ids and token types that the library gives the model for *sample*, a pair or a text."""
    features = transformer.preprocess([sample], prompt=prompt or None)
    types = features.get("token_type_ids")
    return features["input_ids"][0].tolist(), None if types is None else types[0].tolist()


def _by_ids(transformer: Any, tokenizer: TextTokenizer, prompt: str, directory: Path) -> PairForm:
    """Find the tokens of two texts in what the library makes of them; what stands around them is the form."""
    ids, types = _encoded(transformer, [_QUERY, _DOCUMENT], prompt)
    query, document = (
        content.tolist() for content, _ in (tokenizer.content([text])[0] for text in (prompt + _QUERY, _DOCUMENT))
    )
    query_at = _find(query, ids, 0)
    document_at = -1 if query_at < 0 else _find(document, ids, query_at + len(query))
    if document_at < 0:
        raise InvalidModel(
            f"{directory} cannot be given pairs: its tokenizer has no tokens of query and document apart"
        )
    numbers = types or [0] * len(ids)
    between, after = query_at + len(query), document_at + len(document)
    alone, alone_types = _encoded(transformer, _QUERY, prompt)
    alone_at = _find(query, alone, 0)
    alone_types = alone_types or [0] * len(alone)
    alone_end = alone_at + len(query)
    return PairForm(
        Fixed(tuple(ids[:query_at]), tuple(numbers[:query_at])),
        Fixed(tuple(ids[between:document_at]), tuple(numbers[between:document_at])),
        Fixed(tuple(ids[after:]), tuple(numbers[after:])),
        None if alone_at < 0 else Fixed(tuple(alone[:alone_at]), tuple(alone_types[:alone_at])),
        None if alone_at < 0 else Fixed(tuple(alone[alone_end:]), tuple(alone_types[alone_end:])),
        query_lead=prompt,
        types=None if types is None else (numbers[query_at], numbers[document_at]),
    )


def _find(part: list[int], ids: list[int], start: int) -> int:
    places = (at for at in range(start, len(ids) - len(part) + 1) if ids[at : at + len(part)] == part)
    return next(places, -1) if part else -1


def _pair_roles_failure(transformer: Any) -> str | None:
    failure: str | None = transformer.input_formatter.pair_roles_failure(_template_settings(transformer))
    return failure


def _template_settings(transformer: Any) -> dict[str, Any]:
    settings = transformer.processing_kwargs.get("chat_template", {})
    return {key: value for key, value in settings.items() if key not in _NOT_THE_TEMPLATES}


def _by_chat_template(transformer: Any, tokenizer: TextTokenizer, prompt: str, directory: Path) -> PairForm:
    formatter = transformer.input_formatter
    messages = formatter.pair_to_messages([_QUERY, _DOCUMENT])
    if prompt:
        (messages,) = formatter.prepend_prompt_to_messages([messages], prompt)
    text = transformer.processor.apply_chat_template(messages, tokenize=False, **_template_settings(transformer))
    before, query_found, rest = text.partition(_QUERY)
    between, document_found, after = rest.partition(_DOCUMENT)
    if not query_found or not document_found or _QUERY in rest or _DOCUMENT in after:
        raise InvalidModel(f"{directory} cannot be given pairs: its chat template has not the query, then the document")
    return _of_texts(tokenizer, before, between, after)


def _of_texts(tokenizer: TextTokenizer, before: str, between: str, after: str) -> PairForm:
    """
    Return the form of a template's three pieces of text.

    White space next to a query or a document is tokenised with it: byte-pair tokenizers join it to the word beside it.
    """
    between_words = between.strip()
    lead, tail = between.partition(between_words)[::2] if between_words else ("", between)
    first, last = before.rstrip(), after.lstrip()
    return PairForm(
        _fixed(tokenizer, first),
        _fixed(tokenizer, between_words),
        _fixed(tokenizer, last),
        query_lead=before[len(first) :],
        query_tail=lead,
        document_lead=tail,
        document_tail=after[: len(after) - len(last)],
    )


def _fixed(tokenizer: TextTokenizer, text: str) -> Fixed:
    ids = tuple(tokenizer.content([text])[0][0].tolist()) if text else ()
    return Fixed(ids, (0,) * len(ids))


def _check(transformer: Any, made: PairTokenizer, prompt: str, directory: Path) -> None:
    """See that tokens put together are those that the library gives the model, where it need not cut them."""
    limit = transformer.max_seq_length or made.max_tokens
    for query, document in SAMPLES:
        ids, _ = made.query(query)
        pair = made.join(ids, made.documents([document])[0][0])
        if len(pair.tokens.ids) > limit:
            continue
        expected = _encoded(transformer, [query, document], prompt)
        types = None if pair.types is None else list(pair.types)
        if list(pair.tokens.ids) != expected[0] or types != expected[1]:
            raise InvalidModel(
                f"{directory} cannot be given pairs: the tokens of a query and of a document change beside each other"
            )
