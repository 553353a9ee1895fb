"""`fit-pca`: texts through a model to a projection file, with what the projection loses on texts it was not fitted on."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.common.encoders import Encoder, EncoderOptions, Projection, open_encoder
from services.embedding.offline.console import OfflineError, progress
from services.embedding.offline.projection import Vectors, apply, fit, ndcg, recall, unit
from services.embedding.offline.texts import Document, read_documents, read_judgements
from services.embedding.prompts import complete_prompts

_TOKENS_A_BATCH = 4096
_TEXTS_AT_ONCE = 1024
_MOST_HELD_OUT = 1000


@dataclass(frozen=True, slots=True)
class Judged:
    """Queries by id and the grades of documents for each; every query has a grade."""

    queries: dict[str, str]
    grades: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Fitted:
    """
    A projection and its figures.

    *fitted_on* texts made it, *held_out* others were asked with for *recall* (at 10, over *texts* texts). *ndcg* is
    nDCG@10 before and after, over the same texts, None without judgements. *model* and *computed_by* say what embedded
    them.
    """

    projection: Projection
    model: str
    computed_by: str
    dim: int
    texts: int
    fitted_on: int
    held_out: int
    variance_kept: float
    recall: float
    ndcg: tuple[float, float] | None


def read_judged(queries: Path, qrels: Path) -> Judged:
    """
    Read queries, `.jsonl` with `_id` and `text`, and their judgements.

    Raises:
        OfflineError: A file cannot be read, or no query is judged.
    """
    grades = read_judgements(qrels)
    asked = {query.id: query.text for query in read_documents(queries) if query.id in grades}
    if not asked:
        raise OfflineError(f"none of the queries in {queries} is judged in {qrels}")
    return Judged(asked, {id_: grades[id_] for id_ in asked})


def choose_documents(documents: Sequence[Document], *, sample: int, judged: Judged | None) -> list[Document]:
    """
    Return *documents*, each text once, or *sample* of them drawn evenly at random with a fixed seed, in their order.

    With *judged*, every document is kept that has a grade.
    """
    graded = {id_ for grades in judged.grades.values() for id_ in grades} if judged else set()
    seen: set[str] = set()
    distinct = []
    for document in documents:
        if document.id in graded or document.text not in seen:
            distinct.append(document)
            seen.add(document.text)
    if not sample or len(distinct) <= sample:
        return distinct
    drawn = set(np.random.default_rng(0).choice(len(distinct), sample, replace=False).tolist())
    return [document for row, document in enumerate(distinct) if row in drawn or document.id in graded]


def held_out_rows(count: int) -> list[int]:
    """Return a tenth of *count* rows, a thousand at most, drawn with a fixed seed."""
    rows = np.random.default_rng(0).permutation(count)[: min(_MOST_HELD_OUT, max(1, count // 10))]
    return sorted(rows.tolist())


def fit_projection(
    model: str, options: EncoderOptions, documents: Sequence[Document], dimensions: int, judged: Judged | None
) -> Fitted:
    """
    Embed *documents* with *model* and fit a projection to *dimensions* on nine tenths of them.

    Queries and documents get the prompts that the service gives them.

    Raises:
        ModelNotFound: There is no such model.
        OfflineError: There are too few texts for so many dimensions, or the model has no more than that.
    """
    held_out = held_out_rows(len(documents))
    fitted_on = len(documents) - len(held_out)
    if fitted_on <= dimensions:
        raise OfflineError(
            f"{dimensions} dimensions need more than {dimensions} different texts to fit on: there are {fitted_on}, "
            f"and {len(held_out)} held out to measure with"
        )
    encoder = open_encoder(model, options)
    if not dimensions < encoder.description.dim:
        raise OfflineError(
            f"{model} has {encoder.description.dim} dimensions: choose fewer than that, not {dimensions}"
        )
    prompts, _ = complete_prompts(encoder.description.prompts, model)
    whole = embed(encoder, [prompts.get("document", "") + document.text for document in documents], "texts")
    projection, variance_kept = fit(np.delete(whole, held_out, axis=0), dimensions)
    reduced = apply(projection, whole)
    return Fitted(
        projection=projection,
        model=model,
        computed_by=f"{encoder.runtime} {encoder.precision} on {encoder.device}",
        dim=encoder.description.dim,
        texts=len(documents),
        fitted_on=fitted_on,
        held_out=len(held_out),
        variance_kept=variance_kept,
        recall=recall(whole, reduced, held_out),
        ndcg=_ndcg(encoder, prompts, documents, whole, projection, judged) if judged else None,
    )


def _ndcg(
    encoder: Encoder,
    prompts: Mapping[str, str],
    documents: Sequence[Document],
    whole: Vectors,
    projection: Projection,
    judged: Judged,
) -> tuple[float, float]:
    asked = embed(encoder, [prompts.get("query", "") + text for text in judged.queries.values()], "queries")
    ids = [document.id for document in documents]
    before = ndcg(whole, ids, dict(zip(judged.queries, asked, strict=True)), judged.grades)
    shorter = dict(zip(judged.queries, apply(projection, asked), strict=True))
    return before, ndcg(apply(projection, whole), ids, shorter, judged.grades)


def embed(encoder: Encoder, texts: Sequence[str], label: str) -> Vectors:
    """Return *texts*' vectors at unit length, float32 [len(texts), dim], in order, with a progress bar."""
    vectors = np.empty((len(texts), encoder.description.dim), dtype=np.float32)
    with progress(f"embedding {label}", len(texts)) as counter:
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            tokens = encoder.tokenize(texts[start : start + _TEXTS_AT_ONCE])
            order = sorted(range(len(tokens)), key=lambda row: -len(tokens[row].ids))
            while order:
                size = max(1, _TOKENS_A_BATCH // len(tokens[order[0]].ids))
                rows, order = order[:size], order[size:]
                vectors[[start + row for row in rows]] = encoder.pooled([tokens[row] for row in rows])
                counter.add(len(rows))
    return unit(vectors)


def save(projection: Projection, file: Path) -> None:
    """
    Write *projection* at *file*, whole or not at all.

    Raises:
        OfflineError: It cannot be written.
    """
    made = file.with_name(f".making-{file.name}-{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        projection.save(made)
        made.replace(file)
    except OSError as error:
        raise OfflineError(f"{file} cannot be written: {error.strerror or error}") from error
    finally:
        made.unlink(missing_ok=True)
