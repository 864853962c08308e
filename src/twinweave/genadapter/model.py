"""A frozen base that reads a text once and answers from what it read: the generators of its layers, and the passes.

Knows nothing about training loops, tasks or files. What a layer computes is in `generator.py`, what is kept of a text
in `state.py`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import groupby
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..checkpointing import Scope, checkpointing, is_asked_for
from ..decoder import check_causal_lm, decoder_of
from ..errors import BaseMismatchError, DamagedFileError, DataError, UnsupportedModelError, UsageError
from ..fingerprint import fingerprint
from ..text import chunks_of, digest_and_pieces
from . import saving
from .config import GenerativeAdapterConfig, chunk_size_of
from .generator import Generator, gathered
from .passes import Attached, Hook, adding, listening
from .state import AdapterState, as_float, fixed_point
from .targets import find_targets

Text = str | os.PathLike[str] | Iterable[str]


class GenerativeAdapter(nn.Module):
    """A base with a generator of adapters. Only the generator is trained, and only the generator is saved.

    `tokenizer` is needed to read texts; without one it is loaded from where the base came from. Raises
    UnsupportedModelError for a base that cannot carry it.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: GenerativeAdapterConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        super().__init__()
        check_causal_lm(base, "no adapter can be generated for it")
        self.settings = config or GenerativeAdapterConfig()
        self.base_fingerprint = fingerprint(base)
        self.base = base.requires_grad_(False)
        self.targets = find_targets(base, self.settings.target_modules)
        self._generators = [
            Generator(t.hidden_size, t.in_features, t.out_features, self.settings).to(base.device) for t in self.targets
        ]
        self.generators = nn.ModuleList(self._generators)
        self._of_block: dict[nn.Module, list[int]] = {}
        for index, target in enumerate(self.targets):
            self._of_block.setdefault(target.block, []).append(index)
        self._tokenizer = tokenizer
        self._answering = False
        self._attached = Attached()
        self._fingerprint: tuple[Any, str] | None = None

    # --- reading ----------------------------------------------------------------------------------------------------

    def empty_state(self) -> AdapterState:
        """The state of having read nothing: with it the model is the base, bit for bit."""
        size = self.settings.state_size
        sums = {target.name: torch.zeros(size, size, dtype=torch.int64) for target in self.targets}
        return AdapterState(sums, self.fingerprint(), additive=self.settings.mode == "parallel", reader=self)

    @torch.no_grad()
    def read(self, text: Text, *, state: AdapterState | None = None) -> AdapterState:
        """Read one text, in one pass over its chunks of `chunk_size` tokens.

        `text`: a str; a path, whose UTF-8 text is read piece by piece; or an iterable of pieces of one text, such as a
        stream. However it comes, the same text gives the same bits. `state`: what was read before; it is not changed.
        Raises DataError for a text that is empty or not UTF-8.
        """
        digest, pieces = digest_and_pieces(text)
        return self._read(chunks_of(pieces, self.tokenizer, self.chunk_size), digest, state)

    @torch.no_grad()
    def read_ids(self, chunks: Iterable[Sequence[int]], *, state: AdapterState | None = None) -> AdapterState:
        """Read one text that is token ids already, in chunks as the base is to see them; otherwise as `read`."""
        listed = [list(chunk) for chunk in chunks]
        if not all(listed) or not listed:
            raise DataError("There are no token ids to read, or none in one of the chunks. Give chunks with some.")
        name = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
        return self._read(((chunk, len(chunk)) for chunk in listed), lambda: name, state)

    def _read(
        self, chunks: Iterable[tuple[list[int], int]], digest: Callable[[], str], state: AdapterState | None
    ) -> AdapterState:
        self._refuse_within_adapted("A text is read")
        before = self.empty_state() if state is None else state
        self.check_state(before)
        total = {name: tensor.clone() for name, tensor in before.sums.items()}
        tokens = 0
        with self._in_evaluation():
            for ids, own in chunks:
                row = torch.tensor([ids], device=self.base.device)
                hooks = [] if before.additive else self._adding_factors(self._factors_of(total))
                with self._attached.only(hooks):
                    sums = self._chunk_sums(row, torch.ones_like(row))
                named = {target.name: s[0] for target, s in zip(self.targets, sums, strict=True)}
                for name, tensor in fixed_point(named).items():
                    total[name] += tensor
                tokens += own
        documents = before.documents.copy()
        documents[digest()] += 1
        return before.replaced(total, documents, before.tokens + tokens)

    @property
    def chunk_size(self) -> int:
        """Tokens that are read at once: those of the settings, or what the base's window has room for."""
        window = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        return chunk_size_of(self.settings, window)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that texts are read with. Raises UnsupportedModelError where the base has none."""
        if self._tokenizer is None:
            name = self.base.config._name_or_path
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(name)
            except (OSError, ValueError) as error:
                raise UnsupportedModelError(
                    f"The base {name or type(self.base).__name__} comes without a tokenizer. Pass tokenizer=..."
                ) from error
        return self._tokenizer

    # --- answering --------------------------------------------------------------------------------------------------

    @contextmanager
    def adapted(self, state: AdapterState | Sequence[AdapterState]) -> Iterator["GenerativeAdapter"]:
        """Answer from what was read, within the block; afterwards the base is as it was, whatever happened.

        With several states, the rows of a batch belong to them in turn: row i of as many rows answers from state i.
        """
        states = [state] if isinstance(state, AdapterState) else list(state)
        if not states:
            raise UsageError("adapted() got no state. Use reader.empty_state() for having read nothing.")
        self._refuse_within_adapted("Another state is answered from")
        hooks: list[Hook] = []
        if not all(one.is_empty for one in states):
            # neighbours of one state share its factors, which are large
            neighbours = gcd(*(len(list(run)) for _, run in groupby(states, key=id)))
            layers = zip(*(self.lora_factors(one).values() for one in states[::neighbours]), strict=True)
            stacked = [(torch.stack([a for a, _ in layer]), torch.stack([b for _, b in layer])) for layer in layers]
            hooks = self._adding_factors(stacked, len(states))
        else:
            for one in states:
                self.check_state(one)
        self._answering = True
        try:
            with self._attached.only(hooks):
                yield self
        finally:
            self._answering = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own `generate`; within `adapted`, from what was read."""
        generate: Any = self.base.generate
        return generate(*args, **kwargs)

    def check_state(self, state: AdapterState) -> None:
        """Raise BaseMismatchError for a state that another generator, or this one before more training, has read, and
        DamagedFileError for one that lacks a layer."""
        if state.generator != self.fingerprint():
            raise BaseMismatchError(
                f"The state was read by another generator ({state.generator}) than this one ({self.fingerprint()}). "
                "Read the text again, or load the generator that has read it."
            )
        shape = (self.settings.state_size,) * 2
        expected = {target.name: (shape, torch.int64) for target in self.targets}
        if {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in state.sums.items()} != expected:
            raise DamagedFileError(
                "The state does not have the matrices that its generator keeps, one for each adapted layer. Read the "
                "texts again."
            )

    # --- training ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        *args: Any,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        reads: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward, adapted to contexts that are read in the same call; without `context_ids` as it is.

        `context_ids`, `context_mask`: the chunks, [C, M]. `reads`: [Q, C], which of Q states has read which chunks (0
        or 1), in the order of the columns; without it every chunk is a state of its own. The batch has k·Q rows, k
        neighbours for each state. Prefixes of a segment are rows of a triangular `reads`: every chunk is read once.
        """
        if context_ids is None:
            return self.base(*args, **kwargs)
        self._refuse_within_adapted("A context is read")
        mask = torch.ones_like(context_ids) if context_mask is None else context_mask
        if reads is None:
            reads = torch.eye(len(context_ids), device=context_ids.device)
        sums = self._sums_of(context_ids, mask, reads.float())
        changes = [
            partial(generator.change, normalized=generator.normalized(s))
            for generator, s in zip(self._generators, sums, strict=True)
        ]
        again = self.training and is_asked_for(self.base) and torch.is_grad_enabled()
        if again:
            kwargs.setdefault("use_cache", False)
        with (
            self._attached.only(adding(self.targets, changes, len(reads))),
            checkpointing(self.base, lambda: partial(self._attached.only, self._attached.hooks))
            if again
            else nullcontext(),
        ):
            return self.base(*args, **kwargs)

    def train(self, mode: bool = True) -> "GenerativeAdapter":
        """As in torch, but for the base, which stays in evaluation mode: its dropout would blur what is read."""
        self._fingerprint = None  # what writes into `data` leaves no trace in a version
        super().train(mode)
        self.base.eval()
        return self

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base's own, whose blocks then run again in the backward pass."""
        self.base.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The base's own."""
        self.base.gradient_checkpointing_disable()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters and all parameters, as PEFT counts them."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    # --- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write the generator and its settings into the folder `path`; never base weights. See `saving.save`."""
        saving.save(self, path, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        base: PreTrainedModel | str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        allow_base_mismatch: bool = False,
        revision: str | None = None,
        **base_kwargs: Any,
    ) -> "GenerativeAdapter":
        """A saved generator on its base: `base`, or the recorded one, loaded with `base_kwargs`; in evaluation mode.

        `path`: a folder, or a hub name at `revision`. Raises DamagedFileError, BaseMismatchError for another base than
        it was trained on, and UsageError.
        """
        return saving.load(cls, path, base, tokenizer, allow_base_mismatch, revision, base_kwargs)

    def lora_factors(self, state: AdapterState) -> dict[str, tuple[Tensor, Tensor]]:
        """What `state` stands for: name of an adapted layer -> A [r, in] and B [out, r], a LoRA of scaling 1."""
        self.check_state(state)
        known = (self.fingerprint(), self.base.device)
        if state.factors is None or state.factors[0] != known:  # a large model's decompositions take seconds
            state.factors = known, self._factors_of(state.sums)
        return dict(zip((target.name for target in self.targets), state.factors[1], strict=True))

    def export_lora(
        self, state: AdapterState, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write `state` into the folder `path` as a LoRA of PEFT, of rank `rank` for every state, which any server
        loads. In float32 it gives the logits of `adapted(state)`; bfloat16 takes half the space."""
        saving.save_lora(self, self.lora_factors(state), path, dtype)

    # --- what the base has, for those who take this for one ---------------------------------------------------------

    @property
    def config(self) -> Any:
        """The base's."""
        return self.base.config

    @property
    def generation_config(self) -> Any:
        """The base's."""
        return self.base.generation_config

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.base.device

    def fingerprint(self) -> str:
        """Identifies what a state means: base, settings and the generator's weights as they are now."""
        weights = list(self.generators.named_parameters())
        settings = json.dumps(self.settings.to_dict(), sort_keys=True)
        known = settings, tuple((p.data_ptr(), p._version) for _, p in weights)
        if self._fingerprint is None or self._fingerprint[0] != known:
            digest = hashlib.sha256(str(self.base_fingerprint).encode())
            digest.update(settings.encode())
            for name, weight in weights:
                digest.update(name.encode())
                digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._fingerprint = known, digest.hexdigest()[:16]
        return self._fingerprint[1]

    def _refuse_within_adapted(self, what: str) -> None:
        """The base would read through the adapter, and the state would depend on it."""
        if self._answering:
            raise UsageError(f"{what} within adapted(). End that block first; states add up with +.")

    def _scope_of_now(self) -> Scope:
        return partial(self._attached.only, self._attached.hooks)

    # --- passes -----------------------------------------------------------------------------------------------------

    def _chunk_sums(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """S of each chunk in each layer, [C, d_r, d_r], read by the base as it is now; with gradients where wanted."""
        ids, mask = _padded_last(ids, mask)
        sums: list[Any] = [0.0] * len(self.targets)
        wanted = torch.is_grad_enabled()

        def listener(block: nn.Module, states: Tensor) -> None:
            with torch.set_grad_enabled(wanted):
                for index in self._of_block[block]:  # a block that is called twice has read twice
                    sums[index] = sums[index] + self._generators[index].sums(states.detach(), mask)

        with listening(self.targets, ids.shape, listener), torch.no_grad():
            _decoder(self.base)(input_ids=ids, attention_mask=mask, use_cache=False)
        return sums

    def _sums_of(self, ids: Tensor, mask: Tensor, reads: Tensor) -> list[Tensor]:
        """S of each state in each layer, [Q, d_r, d_r]."""
        if self.settings.mode == "parallel":
            return [gathered(reads, s) for s in self._chunk_sums(ids, mask)]
        total: list[Any] = [0.0] * len(self.targets)
        for column in range(len(ids)):
            # a chunk is read once for each different past; what it is read with gets no gradient through the reading
            pasts, which = torch.unique(reads[:, : column + 1], dim=0, return_inverse=True)
            row, seen = ids[column].expand(len(pasts), -1), mask[column].expand(len(pasts), -1)
            first = [int((which == past).nonzero()[0]) for past in range(len(pasts))]
            with self._attached.only([] if column == 0 else self._adding_sums([s[first] for s in total])):
                sums = self._chunk_sums(row, seen)
            total = [t + reads[:, column, None, None] * s[which] for t, s in zip(total, sums, strict=True)]
        return total

    def _adding_sums(self, sums: Sequence[Tensor]) -> list[Hook]:
        with torch.no_grad():
            changes = [
                partial(generator.change, normalized=generator.normalized(s))
                for generator, s in zip(self._generators, sums, strict=True)
            ]
        return adding(self.targets, changes, len(sums[0]))

    def _factors_of(self, sums: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The LoRA pair of each layer, A [r, in] and B [out, r]."""
        state = as_float(sums)
        with torch.no_grad():
            return [
                generator.lora(state[target.name].to(self.base.device))
                for target, generator in zip(self.targets, self._generators, strict=True)
            ]

    def _adding_factors(self, factors: Sequence[tuple[Tensor, Tensor]], states: int = 1) -> list[Hook]:
        """Add the LoRA pairs A [Q, r, in] and B [Q, out, r] (or one pair without Q) to the layers. Each pair is that of
        equally many neighbours among the `states`."""
        pairs = [(a[None], b[None]) if a.ndim == 2 else (a, b) for a, b in factors]
        return adding(self.targets, [partial(_low_rank, a=a, b=b) for a, b in pairs], states)

    @contextmanager
    def _in_evaluation(self) -> Iterator[None]:
        training = [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True


def _low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """x [k·Q, N, in], k neighbours to each pair, through A [Q, r, in] and B [Q, out, r]: [k·Q, N, out]; one pair
    multiplies without a batch dimension."""
    if len(a) == 1 and x.shape[:-1].numel() == 1:  # one token: libraries have faster products for a vector
        return torch.mv(b[0], torch.mv(a[0], x.reshape(-1).to(a.dtype))).view(*x.shape[:-1], -1)
    if len(a) == 1:
        return (x.to(a.dtype) @ a[0].T) @ b[0].T
    y = (x.to(a.dtype).reshape(len(a), -1, x.shape[-1]) @ a.mT) @ b.mT
    return y.view(*x.shape[:-1], -1)


def _padded_last(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks [C, M] with all padding behind their tokens, where no token sees it and none is counted before them."""
    order = (mask == 0).long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.gather(1, order)


def _decoder(base: PreTrainedModel) -> nn.Module:
    decoder = decoder_of(base)
    assert decoder is not None
    return decoder
