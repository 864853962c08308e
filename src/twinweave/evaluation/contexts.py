"""Which rows of a task are answered from which texts, for a model that reads before it is asked: GenerativeAdapter,
whose states are adapters, and CMT, whose states are memories. Knows nothing about tasks or scores.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from twinweave.cmt import MemoryModel
from twinweave.genadapter import GenerativeAdapter

Documents = tuple[str, ...]


def can_read(model: Any) -> bool:
    """Whether the model reads texts apart from the questions about them."""
    return isinstance(model, GenerativeAdapter | MemoryModel)


def read_all(model: Any, documents: Sequence[str]) -> Any:
    """The state of having read these texts, one after the other. Raises DataError for one without text."""
    if isinstance(model, MemoryModel):
        return model.compress(documents)
    state = model.empty_state()
    for document in documents:
        state = model.read(document, state=state)
    return state


def answering(model: Any, states: Any) -> AbstractContextManager[None]:
    """Within the block the model answers from a state, or a batch of rows from a list with the state of each."""
    return model.answering_from(states) if isinstance(model, MemoryModel) else model.adapted(states)


class Contexts:
    """The documents of each row, and the model that reads them: each distinct context once, if the rows come in the
    order of `places`. Only the states that a batch needs are kept, since one may take hundreds of megabytes."""

    def __init__(self, model: Any, of_rows: Sequence[Documents]) -> None:
        self._model, self._of_rows = model, of_rows
        first: dict[Documents, int] = {}
        self.places = [first.setdefault(documents, len(first)) for documents in of_rows]
        """For each row the number of its context."""
        self._states: dict[int, Any] = {}

    @contextmanager
    def adapted(self, rows: Sequence[int]) -> Iterator[None]:
        """Within the block the model answers a batch of these rows, each from its own context."""
        places = [self.places[row] for row in rows]
        self._states = {place: state for place, state in self._states.items() if place in places}
        for row, place in zip(rows, places, strict=True):
            if place not in self._states:
                self._states[place] = read_all(self._model, self._of_rows[row])
        states = [self._states[place] for place in places]
        with answering(self._model, states[0] if len(self._states) == 1 else states):
            yield
