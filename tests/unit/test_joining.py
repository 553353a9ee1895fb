"""Questions that want a vector at the same time share a call, and nobody waits for company or for another's trouble."""

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest

from services.common.deadline import NO_DEADLINE, Deadline
from services.common.errors import DeadlineExceeded, DependencyUnavailable, InvalidInput
from services.search.joining import MOST_TOGETHER, MOST_UNDER_WAY, JoinedQuestions
from services.search.ports import Embedded, EmbeddingModel


class Service:
    """An embedding service whose calls end when the test says so; a text's vector is its length."""

    def __init__(self, *, refused: str = "", open_from_start: bool = False) -> None:
        self.calls: list[tuple[list[str], Deadline, str | None]] = []
        self.given_up = 0
        self.error: Exception | None = None
        self._refused = refused
        self._gates: list[asyncio.Event] = []
        self._open = open_from_start

    async def send(self, texts: Sequence[str], deadline: Deadline, model: str | None) -> Embedded:
        """Wait to be let go; refuse the refused text, and fail as told."""
        self.calls.append((list(texts), deadline, model))
        gate = asyncio.Event()
        self._gates.append(gate)
        try:
            if not self._open:
                await gate.wait()
        except asyncio.CancelledError:
            self.given_up += 1
            raise
        if self.error is not None:
            raise self.error
        if self._refused in texts and self._refused:
            raise InvalidInput(f"{self._refused} is refused", param="inputs")
        return Embedded(np.array([[len(text)] for text in texts], np.float32), EmbeddingModel("m", "f", 1))

    def let_go(self, number: int) -> None:
        """Let call *number* end."""
        self._gates[number].set()

    def let_all_go(self) -> None:
        """Let all calls end, those to come too."""
        self._open = True
        for gate in self._gates:
            gate.set()


async def settled() -> None:
    """Let all tasks go as far as they can."""
    for _ in range(20):
        await asyncio.sleep(0)


def asking(joined: JoinedQuestions, *texts: str, model: str | None = None) -> list["asyncio.Task[Embedded]"]:
    """Begin to ask for each of *texts*."""
    return [asyncio.create_task(joined.ask(text, NO_DEADLINE, model)) for text in texts]


async def test_one_alone_is_sent_at_once_and_what_comes_meanwhile_goes_together() -> None:
    """Two calls of one text, then one call of all that came; everyone has the vector of its own text."""
    service = Service()
    joined = JoinedQuestions(service.send)
    texts = ["a" * size for size in range(1, 8)]
    tasks = asking(joined, *texts)
    await settled()
    assert [call[0] for call in service.calls] == [[text] for text in texts[:MOST_UNDER_WAY]]
    service.let_go(0)
    await settled()
    assert service.calls[MOST_UNDER_WAY][0] == texts[MOST_UNDER_WAY:]
    service.let_all_go()
    made = await asyncio.gather(*tasks)
    assert [item.vectors.tolist() for item in made] == [[[float(len(text))]] for text in texts]


async def test_equal_texts_travel_once_and_calls_are_bounded() -> None:
    """Fifty askers of one text need one row; more than `MOST_TOGETHER` texts need another call."""
    service = Service()
    joined = JoinedQuestions(service.send)
    tasks = asking(joined, "first", "second", *["same"] * 50, *[str(number) for number in range(MOST_TOGETHER)])
    await settled()
    service.let_go(0)
    await settled()
    assert service.calls[2][0][0] == "same"
    assert len(service.calls[2][0]) == 1 + MOST_TOGETHER - 50
    service.let_all_go()
    assert {float(made.vectors[0, 0]) for made in await asyncio.gather(*tasks[2:52])} == {4.0}
    assert max(len(call[0]) for call in service.calls) <= MOST_TOGETHER


async def test_models_do_not_hold_each_other_back() -> None:
    """Questions for another model are sent while the first model's calls are under way, and apart from them."""
    service = Service()
    joined = JoinedQuestions(service.send)
    tasks = asking(joined, "a", "b", "c") + asking(joined, "d", model="other")
    await settled()
    assert [(call[0], call[2]) for call in service.calls] == [(["a"], None), (["b"], None), (["d"], "other")]
    service.let_all_go()
    await asyncio.gather(*tasks)


async def test_who_leaves_harms_nobody() -> None:
    """One asker of a shared call is cancelled and the other is answered; when all have left the call is given up."""
    service = Service()
    joined = JoinedQuestions(service.send)
    tasks = asking(joined, "a", "b", "c", "d", "e")
    await settled()
    tasks[4].cancel()  # It waits: it is never sent.
    service.let_go(0)
    await settled()
    assert service.calls[2][0] == ["c", "d"]
    tasks[2].cancel()
    await settled()
    assert service.given_up == 0
    tasks[1].cancel()
    await settled()
    assert service.given_up == 1
    service.let_go(2)
    assert (await tasks[3]).vectors.tolist() == [[1.0]]


async def test_the_call_has_the_time_of_the_most_patient_and_each_its_own() -> None:
    """The one in a hurry is told that its time is up; the other is answered by the same call."""
    service = Service()
    joined = JoinedQuestions(service.send)
    first = asking(joined, "a", "b")
    await settled()
    patient = Deadline.after(60)
    hurried = asyncio.create_task(joined.ask("c", Deadline.after(0.05), None))
    waiting = asyncio.create_task(joined.ask("d", patient, None))
    await settled()
    service.let_go(0)
    await settled()
    assert service.calls[2][:2] == (["c", "d"], patient)
    with pytest.raises(DeadlineExceeded):
        await hurried
    service.let_all_go()
    assert (await waiting).vectors.tolist() == [[1.0]]
    await asyncio.gather(*first)
    with pytest.raises(DeadlineExceeded):
        await joined.ask("late", Deadline.after(-1), None)


async def test_a_refused_text_is_refused_to_its_own_asker() -> None:
    """A call of several that is refused is made again for each alone."""
    service = Service(refused="bad")
    joined = JoinedQuestions(service.send)
    tasks = asking(joined, "a", "b", "good", "bad", "fine")
    await settled()
    service.let_all_go()
    made = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(made[3], InvalidInput)
    assert all(isinstance(item, Embedded) for item in made[:3] + made[4:])


async def test_an_unavailable_service_fails_all_of_a_call_and_the_next_is_sent() -> None:
    """Everyone who shared the call has the error, and nothing is held back after it."""
    service = Service()
    service.error = DependencyUnavailable("embedding is down")
    joined = JoinedQuestions(service.send)
    tasks = asking(joined, "a", "b", "c", "d")
    await settled()
    service.let_all_go()
    made = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(item, DependencyUnavailable) for item in made)
    service.error = None
    assert (await joined.ask("again", NO_DEADLINE, None)).vectors.tolist() == [[5.0]]


async def test_calls_that_hang_hold_nobody_back_for_long() -> None:
    """While two calls hang, a question that comes is sent all the same, after a moment."""
    service = Service()
    joined = JoinedQuestions(service.send)
    tasks = asking(joined, "a", "b", "c")
    while len(service.calls) < 3:
        await asyncio.sleep(0.01)
    service.let_go(2)
    assert (await tasks[2]).vectors.tolist() == [[1.0]]
    service.let_all_go()
    await asyncio.gather(*tasks)
