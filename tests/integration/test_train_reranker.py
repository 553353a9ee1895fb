"""`tercet train-reranker`: from a user's judgements and a running stack to a model that the rerank service loads."""

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import CrossEncoder

from services.common.model_files import resolve_model
from services.rerank.models import load_backends, load_blend
from services.rerank.settings import RerankSettings
from tercet.client import TercetClient
from tests.own_judgements import COLLECTION, QUERIES, documents, judged, write_answers
from tests.search_process import SearchProcess, ServiceProcess
from tests.tiny_models import write_bert
from training.data import DataError
from training.own.asking import Gathered, gather
from training.own.judgements import read_judged
from training.own.starting import open_start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch, tmp_path) -> Iterator[None]:
    """Tests share two cores with others; models that are made whole stay in the test's folder."""
    before = torch.get_num_threads()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def search_url(tmp_path_factory) -> Iterator[str]:
    """A search service of real processes, with an embedding model that needs no weights, and the collection in it."""
    place = tmp_path_factory.mktemp("services")
    embedding = ServiceProcess("embedding", place / "embedding.log", EMBEDDING_MODEL="fake")
    search = SearchProcess(place / "data", SEARCH_EMBEDDING_URL=embedding.url)
    for service in (embedding, search):
        service.start()
    search.ask("POST", f"/collections/{COLLECTION}/documents", {"documents": documents()})
    yield search.url
    for service in (search, embedding):
        service.stop()


@pytest.fixture
async def client(search_url) -> AsyncIterator[TercetClient]:
    """A client of it."""
    async with TercetClient(search_url) as made:
        yield made


def tercet(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tercet.cli", *map(str, arguments)]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False, env=environ)


async def gathered(client: TercetClient, file: Path, **more) -> Gathered:
    return await gather(client, COLLECTION, read_judged(file, None), lambda line: None, **more)


async def test_from_judgements_to_a_model_that_is_served(client, tmp_path):
    """
    The command reads the collection, trains, prints nDCG@10 before and after and the settings, and writes what loads.

    The rerank service takes it with its constants. Exported, it is a plain directory with the same scores, and both can
    be trained further.
    """
    bert, out = write_bert(tmp_path / "bert"), tmp_path / "mine"
    file = write_answers(tmp_path / "judged.jsonl", judged())
    given = ["train-reranker", "--collection", COLLECTION, "--judgements", file, "--url", client.base_url]
    done = tercet(*given, "--out", out, "--from", bert, "--rounds", 12)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert f"nDCG@10 of {QUERIES // 4} held-back queries" in done.stdout
    assert f"RERANK_MODEL={out} RERANK_FIRST_STAGE=late-interaction/{bert} tercet up" in done.stdout
    assert not list(tmp_path.glob(".training-*"))

    settings = RerankSettings(
        model=str(out), first_stage=f"late-interaction/{bert}", device="cpu", runtime="torch", precision="fp32"
    )
    first, last = load_backends(settings)
    assert load_blend(settings, first.info) is not None
    assert last.info.ranks
    for backend in (first, last):
        backend.close()

    plain = tmp_path / "plain"
    exported = tercet("export", "--format", "sentence-transformers", "--model", out, "--out", plain)
    assert exported.returncode == 0, exported.stderr
    pairs = [(query, documents()[0]["text"]) for query in list(judged())[:4]]
    scores = [CrossEncoder(str(place), device="cpu").predict(pairs) for place in (plain, resolve_model(str(out)))]
    assert np.array_equal(*scores)
    assert len(set(scores[0].tolist())) == len(pairs)

    again = tercet(*given, "--out", out, "--from", out)
    assert (again.returncode, "holds something" in again.stderr) == (1, True)
    for start in (str(out), str(plain)):
        assert open_start(start).is_reranker
    assert open_start(str(out)).embedding_model == str(bert)


async def test_what_is_read_of_the_collection(client, tmp_path):
    """
    Answers are positions of passages, unknown ids are left out, and search proposes candidates for each question.

    What answers held-back queries only is closed: no question is made of it.
    """
    every = [document["id"] for document in documents()]
    answers = {query: [every[number % len(every)], "nowhere"] for number, query in enumerate(judged())}
    file = write_answers(tmp_path / "judged.jsonl", {**answers, "where is what is not there": ["nowhere"]})
    found = await gathered(client, file, made_most=10)
    parts = {
        part: [q for q in found.questions if q.kind == "real" and q.part == part] for part in ("train", "held-back")
    }
    assert {part: len(questions) for part, questions in parts.items()} == {"train": 24, "held-back": 8}
    assert sum(question.kind != "real" for question in found.questions) == 10
    ids = [passage.id for passage in found.collection.passages]
    for question in [*parts["train"], *parts["held-back"]]:
        assert [ids[at] for at in question.answers] == answers[question.text][:1]
    used = {part: {at for question in questions for at in question.answers} for part, questions in parts.items()}
    assert found.collection.closed == used["held-back"] - used["train"] != set()
    made_of = {at for question in found.questions if question.kind != "real" for at in question.answers}
    assert not made_of & found.collection.closed
    for proposed in found.proposed:
        assert len(proposed.passages) == len(set(proposed.passages)) > 10
        assert set(proposed.bm25) <= set(proposed.passages)


async def test_what_cannot_be_trained_on_is_said(client, tmp_path):
    """Too few queries, a collection that is not there, judgements that cannot be read: status 1 and one line."""
    few = write_answers(tmp_path / "few.jsonl", dict(list(judged().items())[:5]))
    with pytest.raises(DataError, match="5 judged queries"):
        await gathered(client, few)
    given = ["train-reranker", "--url", client.base_url, "--out", tmp_path / "out", "--judgements"]
    done = tercet(*given, few, "--collection", "nothing")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "nothing" in done.stderr
    done = tercet(*given, tmp_path / "no.jsonl", "--collection", COLLECTION)
    assert (done.returncode, "no.jsonl" in done.stderr) == (1, True)
    assert not (tmp_path / "out").exists()
