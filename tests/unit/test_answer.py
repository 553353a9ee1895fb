"""An answer as a value and as bytes: both say the same, made now or kept."""

import orjson

from services.common.wire.search import (
    CacheReply,
    Coverage,
    Hit,
    PipelineReply,
    SearchReply,
    ShardCoverage,
    StageScores,
)
from services.search.answer import Answer

HIT = Hit(id="ä\n", score=0.5, score_kind="dense", text='"x"', metadata={"n": [1]}, stages=StageScores(dense=0.5))
REPLY = SearchReply(
    collection="books",
    hits=[HIT],
    coverage=Coverage(ratio=0.5, shards=ShardCoverage(total=2, ok=1, failed=1)),
    degraded=["shards_partial"],
    pipeline=PipelineReply(retrieval="dense"),
    cache=CacheReply(hit=False),
    as_of=7,
    timings_ms={"total": 1.5},
    request_id="r-1",
)


def test_the_bytes_are_the_reply() -> None:
    """What travels is the reply as JSON, without what is None."""
    assert orjson.loads(Answer(REPLY).body()) == REPLY.model_dump(mode="json", exclude_none=True)


def test_one_answer_for_several_callers() -> None:
    """Each caller's copy has its own id and times; the first one stays what it was."""
    answer = Answer(REPLY)
    other = answer.addressed("r-2", {"total": 0.1})
    expected = REPLY.model_copy(update={"request_id": "r-2", "timings_ms": {"total": 0.1}})
    assert other.reply() == SearchReply.model_validate_json(other.body()) == expected
    assert answer.reply() == REPLY


def test_a_kept_one_says_what_holds_now() -> None:
    """Of a kept answer all is as it was made, but for what is said to this caller."""
    kept = Answer.kept(Answer(REPLY).head, CacheReply(hit=True, age_ms=3), ("stale",)).addressed(None, {})
    own = {"cache": CacheReply(hit=True, age_ms=3), "degraded": ["stale"], "request_id": None, "timings_ms": {}}
    assert kept.reply() == REPLY.model_copy(update=own)
    assert b"request_id" not in kept.body()


def test_flags_are_added_once() -> None:
    """A step down that the answer has already is not named twice."""
    answer = Answer(REPLY)
    assert answer.flagged(["shards_partial"]) is answer
    assert answer.flagged(["shards_partial", "stale"]).reply().degraded == ["shards_partial", "stale"]
    assert answer.degraded == ["shards_partial"]
