"""What the gate reads of the query, and what of it has to be remembered between two calls of a generation.

Knows nothing about gates, adapters or caches: it averages features over positions.

The query memory at position t is the mean over the query's tokens at positions ≤ t, padding excluded. At and after the
end of the query this is the paper's fixed q; before it, it is a running mean, so that no position sees a later one.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class QueryState:
    """The query features of everything seen so far, and which of it is query; rides along with a cache.

    They are r numbers a token, against thousands in the key-value cache. Keeping all of them makes cropping exact, and
    lets a later call say something else about earlier columns (an answer that ended early is padding from then on).
    """

    features: Tensor  # [B, columns, k]
    attended: Tensor  # bool [B, columns]: no padding
    asked: Tensor  # bool [B, columns]: part of what the caller calls the query
    masked: bool = False  # somebody said which tokens are the query: tokens of which nothing is said are not
    mean: Tensor | None = None  # [B, 1, k]: the mean over the whole query, where `settle` was called
    _settled_by: object = None
    _answer: list[Tensor] = field(default_factory=list)  # features behind the query, joined when they are needed

    @property
    def rows(self) -> int:
        """B."""
        return self.features.shape[0]

    @property
    def columns(self) -> int:
        """How many columns have been seen, padding included."""
        return self.features.shape[1] + sum(features.shape[1] for features in self._answer)

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in the given order (beam search, batch selection)."""
        self.join()
        rows = rows.to(self.features.device)
        self.features, self.attended, self.asked = self.features[rows], self.attended[rows], self.asked[rows]
        self.mean = self.mean[rows] if self.mean is not None else None

    def crop(self, columns: int) -> None:
        """Forget the last `columns` columns. `mean` stays: it is what was said of a query that is over."""
        self.join()
        keep = self.columns - columns
        self.features, self.attended = self.features[:, :keep], self.attended[:, :keep]
        self.asked = self.asked[:, :keep]

    def settle(self, mean: Tensor, by: object) -> None:
        """The query is over, its mean is `mean` [B, 1, k]: `by` (a call) need not compute it again."""
        self.mean, self._settled_by = mean, by

    def answer(self, features: Tensor, by: object) -> Tensor | None:
        """The settled mean [B, 1, k] for one more chunk [B, T, k] behind the query; None if `by` settled nothing."""
        if self.mean is None or self._settled_by is not by:
            return None
        self._answer.append(features)
        return self.mean

    def join(self) -> None:
        """Put the chunks of the answer behind the rest, as `extend` does with chunks of which nothing is said."""
        if self._answer:
            self.features = torch.cat((self.features, *self._answer), dim=1)
            self._answer.clear()
            self.attended = _grown(self.attended, self.columns, True)
            self.asked = _grown(self.asked, self.columns, not self.masked)


def ends_of_labels(labels: Tensor, attended: Tensor, anything_before: Tensor | None = None) -> Tensor:
    """Where the query of each position ends (exclusive column, [B, T]), when `labels` says what is being answered.

    Inside a run of labels (an answer) the query is everything before the run; elsewhere, everything up to the position.
    For one answer behind one prompt this is "the tokens before the first label". An answer with nothing before it
    (`anything_before`, bool [B]: not even in a cache) has no query of its own; its positions average up to themselves.
    """
    columns = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    labelled = labels != -100
    starts_run = labelled & ~torch.nn.functional.pad(labelled, (1, 0))[:, :-1]
    run_start = torch.where(starts_run, columns, 0).cummax(dim=1).values
    attended_before = attended.long().cumsum(1) - attended.long()  # tokens strictly before each column
    has_query = attended_before.gather(1, run_start) > 0
    if anything_before is not None:
        has_query = has_query | anything_before.unsqueeze(1)
    return torch.where(labelled & has_query, run_start, columns + 1)


def extend(
    features: Tensor, attended: Tensor | None = None, asked: Tensor | None = None, state: QueryState | None = None
) -> QueryState:
    """What is known after one more chunk. `features`: [B, T, k].

    `attended` and `asked` speak of the chunk, bool [B, T], or of everything so far, bool [B, columns + T]; None says
    nothing: the chunk is attended, and it is query unless somebody said before which tokens are.
    """
    if state is None:
        nothing = torch.zeros(features.shape[0], 0, dtype=torch.bool, device=features.device)
        state = QueryState(features[:, :0], nothing, nothing)
    state.join()
    masked = state.masked or asked is not None
    length = features.shape[1]
    return QueryState(
        torch.cat((state.features, features), dim=1),
        _joined(state.attended, attended, length, default=True),
        _joined(state.asked, asked, length, default=not masked),
        masked,
    )


def _joined(before: Tensor, said: Tensor | None, length: int, default: bool) -> Tensor:
    if said is None:
        return _grown(before, before.shape[1] + length, default)
    return said if said.shape[1] == before.shape[1] + length else torch.cat((before, said), dim=1)


def _grown(mask: Tensor, columns: int, value: bool) -> Tensor:
    return torch.nn.functional.pad(mask, (0, columns - mask.shape[1]), value=value)


def query_mean(state: QueryState, ends: Tensor) -> Tensor:
    """Mean of the query features before each position's end: ends [B, T] (exclusive columns) -> [B, T, k].

    Zero where a query is empty (left padding).
    """
    included = state.attended & state.asked
    # where, not a product: the states of padded positions may be NaN
    kept = torch.where(included.unsqueeze(-1), state.features, 0.0)
    sums = torch.nn.functional.pad(kept.cumsum(1), (0, 0, 1, 0))  # column c: the sum over the columns before c
    counts = torch.nn.functional.pad(included.cumsum(1), (1, 0))
    total = sums.gather(1, ends.unsqueeze(-1).expand(-1, -1, sums.shape[-1]))
    return total / counts.gather(1, ends).unsqueeze(-1).clamp(min=1)
