"""A frozen base that answers from a bank of documents, each compressed once into a few vectors.

Knows nothing about training loops, tasks or files. Compression is in `compressor.py`, what the memories say to a
question in `aggregator.py`, how the base gets to see it in `prefix.py`, where memories are kept in `bank.py`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checkpointing import checkpointing, is_asked_for
from ..decoder import check_causal_lm, with_last_hidden_state
from ..errors import TwinweaveError, UsageError
from ..fingerprint import fingerprint
from . import saving
from .aggregator import Aggregator, pooled
from .bank import MemoryBank, Where
from .checks import check_adapter, check_generation
from .compressor import Compressor
from .config import CMTConfig
from .contrast import ContrastWithoutMemory
from .learning import IGNORED, asked, belonging, matching_loss, seen_of
from .memorizing import Document, Entry, batches_of, memorize
from .objective import contrasted
from .prefix import Prefix, fill, setting, shapes_of, take_cache
from .reading import Reader, Text
from .retrieval import Found, Given, found_for, nearest
from .rows import Hit

# what decides how strongly an adapter of the same weights acts
_OF_THE_ADAPTER = ("lora_alpha", "alpha_pattern", "use_rslora", "scaling", "alpha")


class MemoryModel(nn.Module):
    """A base with a bank of compressed documents. Only compressor, aggregator and prefix are trained, and saved.

    `adapter`: the compressor's, of PEFT; LoRA of rank 16 on all linear layers by default. `bank`: a `MemoryBank`'s path
    that ends in `.lance`, or None for a model without documents. `tokenizer`: needed for texts; without one it is
    loaded from where the base came from. Raises UnsupportedModelError for a base that cannot carry it.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        config: CMTConfig | None = None,
        adapter: PeftConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        bank: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        check_causal_lm(base, "it cannot carry memories")
        self.settings = config or CMTConfig()
        adapter = adapter or LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        check_adapter(adapter)
        self.base_fingerprint = fingerprint(base)
        shapes = shapes_of(base.requires_grad_(False))
        device = base.device
        self.compressor = Compressor(base, adapter, self.settings.memory_tokens)
        width = self.compressor.width
        self.aggregator = Aggregator(width, self.settings).to(device)
        self.prefix = Prefix(width, self.settings.prefix_rank, shapes).to(device)
        self._bank_path: str | None = None
        self._bank: MemoryBank | None = None
        self._given: Given | None = None
        self._fingerprint: tuple[Any, str] | None = None
        self.distractors = 1.0
        """In training, the share of the other documents of its batch that a question sees; whoever trains moves it, as
        `distractor_warmup` has it."""
        self.reader = Reader(self.compressor, self.settings, tokenizer)
        try:
            if (text := self.settings.init_text) is not None:
                self.compressor.start_from(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            if bank is not None:
                self.open_bank(bank)
        except TwinweaveError:
            self.take_apart()
            raise

    def take_apart(self) -> None:
        """Give the base back as it was, without the adapter; the model is of no use from then on."""
        tuner: Any = self.compressor.peft.base_model
        tuner.unload()
        if hasattr(self.base, "peft_config"):
            del self.base.peft_config

    # --- documents --------------------------------------------------------------------------------------------------

    def open_bank(self, path: str | os.PathLike[str] | None) -> None:
        """Answer from the bank at `path` from now on; None: from none. Raises BaseMismatchError for one that another
        compressor has written."""
        before, self._bank_path, self._bank = self._bank_path, None if path is None else os.fspath(path), None
        if path is not None:
            try:
                _ = self.bank  # another compressor's is refused now, not at the first question
            except TwinweaveError:
                self._bank_path = before
                raise

    @property
    def bank(self) -> MemoryBank:
        """The bank of this compressor's memories. Raises UsageError where none was given, and BaseMismatchError for
        one that another compressor, or this one before more training, has written."""
        if self._bank_path is None:
            raise UsageError("This model has no bank. Pass bank=PATH.lance to MemoryModel.from_pretrained.")
        made_by = self.fingerprint()
        if self._bank is None or self._bank.compressor != made_by:
            shape = (self.settings.memory_tokens, self.compressor.width)
            self._bank = MemoryBank(self._bank_path, made_by, shape)
        return self._bank

    def memorize(
        self,
        documents: Text | Iterable[Text],
        ids: str | Iterable[str] | None = None,
        metadata: Mapping[str, Any] | Iterable[Mapping[str, Any]] | None = None,
        *,
        batch_size: int = 16,
    ) -> list[str]:
        """Compress documents and put them into the bank; the id of each.

        A document is a str, or a path whose UTF-8 text is read. `ids`: their names; without one a document goes by the
        start of its SHA-256. A text that is in the bank already is not compressed again, and keeps the name it has
        there; another text under a name that is there replaces the old one. Each batch is one change of the bank.
        Raises DataError for a document that is empty or not UTF-8, and UsageError.
        """
        single = isinstance(documents, str | os.PathLike)
        texts: list[Any] = [documents] if single else list(documents)  # type: ignore[arg-type]
        names: list[Any] = [None] * len(texts) if ids is None else [ids] if isinstance(ids, str) else list(ids)
        told: list[Any] = [{}] * len(texts)
        if metadata is not None:
            told = [metadata] if isinstance(metadata, Mapping) else list(metadata)
        for what, given in (("ids", names), ("metadata", told)):
            if len(given) != len(texts):
                raise UsageError(f"{what} has {len(given)} entries for {len(texts)} documents. Give one for each.")
        rows = zip(texts, names, told, strict=True)
        return [entry.id for entries in self.memorizing(rows, batch_size) for entry in entries]

    def memorizing(self, documents: Iterable[Document], batch_size: int = 256) -> Iterator[list[Entry]]:
        """Memorize a stream of (document, id or None, metadata), what became of each of a batch at a time.

        A batch is in the bank, by one change, when it is yielded; no more than a batch is held. See `memorize`.
        """
        for batch in batches_of(documents, batch_size):
            yield memorize(self.reader, self.bank, batch)

    def forget(self, ids: str | Iterable[str]) -> list[str]:
        """Take documents out of the bank; the ids that were there."""
        return self.bank.remove([ids] if isinstance(ids, str) else list(ids))

    def search(
        self, questions: str | Sequence[str], top_k: int | None = None, where: Where | None = None
    ) -> list[list[Hit]]:
        """The `top_k` memories most similar to each question, the nearest first. `where`: see `MemoryBank.search`."""
        ids, mask = self.reader.questions(questions)
        return self.bank.search(pooled(self.reader.compressed(ids, mask)), self._top_k(top_k), where)

    def compress(self, documents: Text | Iterable[Text], *, batch_size: int = 16) -> Tensor:
        """The memories [n, k, D] of documents, n being at least their number: a long one has several. They are for
        `answering_from`, and go into no bank. Raises DataError as `memorize` does."""
        return self.reader.compress(documents, batch_size)

    @contextmanager
    def answering_from(self, memories: Given) -> Iterator[None]:
        """Within the block, answer from these memories as from a bank that holds them, and from no bank.

        memories: [n, k, D], or a list with one such tensor for each row of a batch; of none the base answers. `top_k`
        and `min_similarity` hold as for a bank.
        """
        before, self._given = self._given, memories
        try:
            yield
        finally:
            self._given = before

    # --- answers ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        questions: str | Sequence[str] | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        top_k: int | None = None,
        where: Where | None = None,
        contrast: float = 0.0,
        **options: Any,
    ) -> Any:
        """Answers from the `top_k` memories most similar to each question; of an empty bank, the base's own.

        questions: a text, or several; then the answers are texts too. Or `input_ids` [B, T], as of transformers (padded
        on the left), and the result is that of transformers' generate. `where`: see `MemoryBank.search`. `contrast`:
        alpha of contrastive decoding, (1 + alpha) l(y | M*, q) - alpha l(y | q), which takes a second pass; 0: off.
        `options`: those of transformers' generate.
        """
        if (questions is None) == (input_ids is None):
            raise UsageError("generate() takes questions, or input_ids. Give one of them.")
        if input_ids is not None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            return self._generate(input_ids, mask, top_k, where, contrast, options)
        assert questions is not None
        if isinstance(questions, Sequence) and not questions:
            return []
        ids, mask = self.reader.questions(questions)
        options.setdefault("pad_token_id", self.reader.pad_id)
        output = self._generate(ids, mask, top_k, where, contrast, options)
        sequences = output if isinstance(output, Tensor) else output.sequences
        texts = self.tokenizer.batch_decode(sequences[:, ids.shape[1] :], skip_special_tokens=True)
        texts = [text.strip() for text in texts]
        return texts[0] if isinstance(questions, str) and len(texts) == 1 else texts

    def _generate(
        self,
        ids: Tensor,
        mask: Tensor,
        top_k: int | None,
        where: Where | None,
        contrast: float,
        options: dict[str, Any],
    ) -> Any:
        check_generation(self.base, options, contrast)
        generate: Any = self.base.generate
        found = self._retrieved(ids, mask, top_k, where)
        if found is None:
            return generate(input_ids=ids, attention_mask=mask, **options)
        # of each row, neighbours in the batch
        copies = max(setting(self.base, options, name) or 1 for name in ("num_return_sequences", "num_beams"))
        if contrast:
            own = options.pop("logits_processor", None) or []
            first = ContrastWithoutMemory(self.base, ids, mask, contrast, copies)
            options["logits_processor"] = LogitsProcessorList([first, *own])
        self._check_room(ids.shape[1])
        cache = take_cache(self.base, options, self.settings.memory_tokens + ids.shape[1])
        fill(cache, self.prefix(self.aggregator(found.question, found.memories, found.seen)), self.base.dtype, copies)
        whole = self._with_prefix(mask, found.having)
        return generate(input_ids=ids, attention_mask=whole, past_key_values=cache, **options)

    # --- training ---------------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        query_mask: Tensor | None = None,
        context_ids: Tensor | None = None,
        context_mask: Tensor | None = None,
        reads: Tensor | None = None,
        frozen: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base's forward, with the prefix of the memories in front of each row.

        A row's question is its tokens before the first label, or those of `query_mask` (bool [B, T]), or all of them.
        Without `context_ids` the memories come from the bank (or `answering_from`), and all else is as in the base.

        With `context_ids` and `context_mask`, the documents [C, M] to compress in this call, every row sees all of
        them, and `labels` are needed. `reads` [Q, C]: which documents hold the answer of which of Q groups of
        neighbouring rows (0 or 1); without it there are as many groups as documents. `frozen` [N, d]: the base's own
        last hidden states at the N positions that predict labels, where they are known. The loss is the memory-aware
        objective with the self-matching loss, the logits are those with memory at the N positions, [1, N, V].
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if context_ids is None:
            found = self._retrieved(*asked(input_ids, mask, labels, query_mask), None, None)
            inputs = {"input_ids": input_ids, "attention_mask": mask, "labels": labels, **kwargs}
            if num_items_in_batch is not None:
                inputs["num_items_in_batch"] = num_items_in_batch
            if found is not None:
                memory = self.aggregator(found.question, found.memories, found.seen)
                inputs = self._in_front(inputs, memory, found.having)
            return self.base(**inputs)
        if labels is None:
            raise UsageError("forward() got context_ids and no labels, so there is nothing to learn. Pass labels.")
        settings = self.settings
        context_mask = torch.ones_like(context_ids) if context_mask is None else context_mask
        belongs = belonging(reads, len(context_ids), len(input_ids), context_ids.device)
        memories = self._compress_documents(context_ids, context_mask)
        question = self.compressor(*asked(input_ids, mask, labels, query_mask))
        memory = self.aggregator(question, memories[None], seen_of(belongs, self.distractors if self.training else 1.0))
        with_memory, without, targets = self._logits_at_labels(input_ids, mask, labels, memory, frozen)
        judged = contrasted(with_memory, without, settings.memory_aware_weight)
        count = max(len(targets), 1) if num_items_in_batch is None else num_items_in_batch
        loss = cross_entropy(judged, targets, reduction="sum") / count
        if settings.self_matching_weight:
            matching = matching_loss(question, memories, belongs, labels, context_ids, context_mask, settings)
            # a trainer that accumulates adds the parts of a step up, and each part says its share of the whole
            loss = loss + settings.self_matching_weight * matching * (len(targets) / count)
        return CausalLMOutputWithPast(loss=loss, logits=with_memory[None])

    def _logits_at_labels(
        self, ids: Tensor, mask: Tensor, labels: Tensor, memory: Tensor, frozen: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [N, V] with memory and without at the N positions that predict labels, and the labels there, [N].

        The head runs once, over the states of both. Without the memory-aware objective those without memory are those
        with it, since nothing looks at them.
        """
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        aware = self.settings.memory_aware_weight > 0
        if aware and frozen is None:
            frozen = self.frozen_states(ids, mask, labels)

        def at_labels(module: nn.Module, args: Any, output: Any) -> Any:
            states = output[0][rows, columns]
            if aware and frozen is not None:
                states = torch.cat((states, frozen.to(states.dtype)))
            return with_last_hidden_state(output, states[None])

        handle = self.compressor.decoder.register_forward_hook(at_labels)
        try:
            inputs = self._in_front({"input_ids": ids, "attention_mask": mask}, memory)
            logits = self.base(**inputs).logits[0].float()
        finally:
            handle.remove()
        with_memory = logits[: len(rows)]
        without = logits[len(rows) :].detach() if aware else with_memory
        return with_memory, without, labels[rows, columns + 1]

    @torch.no_grad()
    def frozen_states(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        """The base's own last hidden states [N, d] at the positions that predict labels: what the memory-aware
        objective needs of it, the same in every epoch."""
        rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self.compressor.takes_positions:
            given["position_ids"] = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        states: Tensor = self.compressor.decoder(**given)[0]
        return states[rows, columns]

    def _compress_documents(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Memories [C, k, D]; in training only a share of the documents carries a gradient, if the settings say so."""
        share = self.settings.gradient_share
        if not (self.training and torch.is_grad_enabled() and share < 1):
            return self._checkpointed(ids, mask)
        order = torch.randperm(len(ids), device=ids.device)
        learned, rest = order.split([n := max(1, round(share * len(ids))), len(ids) - n])
        with torch.no_grad():
            fixed = self.compressor(ids[rest], mask[rest]) if len(rest) else None
        made = self._checkpointed(ids[learned], mask[learned])
        whole = made if fixed is None else torch.cat((made, fixed))
        return whole[order.argsort()]

    def _checkpointed(self, ids: Tensor, mask: Tensor) -> Tensor:
        again = self.training and is_asked_for(self.base) and torch.is_grad_enabled()
        with checkpointing(self.base, lambda: self.compressor.active) if again else nullcontext():
            return self.compressor(ids, mask)

    def train(self, mode: bool = True) -> "MemoryModel":
        """As in torch, but for the base, which stays in evaluation mode; the adapter's dropout follows `mode`."""
        self._fingerprint = None  # what writes into `data` leaves no trace in a version
        super().train(mode)
        self.compressor.train(mode)
        return self

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """The base's own, for the compression of documents, whose blocks then run again in the backward pass."""
        self.base.gradient_checkpointing_enable(*args, **kwargs)
        self.base.disable_input_require_grads()  # the memory tokens carry the gradient, and this hook would stay

    def gradient_checkpointing_disable(self) -> None:
        """The base's own."""
        self.base.gradient_checkpointing_disable()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable parameters and all parameters, as PEFT counts them."""
        counts = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)

    # --- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(self, path: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write what is trained and its settings into the folder `path`; never base weights, and not the bank."""
        saving.save(self, path, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        base: PreTrainedModel | str | None = None,
        *,
        bank: str | os.PathLike[str] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        is_trainable: bool = False,
        allow_base_mismatch: bool = False,
        revision: str | None = None,
        **base_kwargs: Any,
    ) -> "MemoryModel":
        """A saved model on its base: `base`, or the recorded one, loaded with `base_kwargs`; with the bank at `bank`.

        `path`: a folder, or a hub name at `revision`. `is_trainable`: for more training. Raises DamagedFileError,
        BaseMismatchError for another base than it was trained on or a bank of another compressor, and UsageError.
        """
        return saving.load(cls, path, base, bank, tokenizer, is_trainable, allow_base_mismatch, revision, base_kwargs)

    def fingerprint(self) -> str:
        """Identifies what a memory means: the base, the settings of the compressor and its weights as they are now."""
        weights = [(n, p) for n, p in self.compressor.own_parameters()]
        adapter = self.compressor.peft.active_peft_config
        sizes: dict[str, Any] = {
            "memory_tokens": self.settings.memory_tokens,
            "document_tokens": self.settings.document_tokens,
        }
        sizes |= {name: getattr(adapter, name, None) for name in _OF_THE_ADAPTER}
        known = sizes, tuple((p.data_ptr(), p._version) for _, p in weights)
        if self._fingerprint is None or self._fingerprint[0] != known:
            digest = hashlib.sha256(str(self.base_fingerprint).encode())
            digest.update(json.dumps(sizes, sort_keys=True, default=str).encode())
            for name, weight in weights:
                digest.update(name.encode())
                digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._fingerprint = known, digest.hexdigest()[:16]
        return self._fingerprint[1]

    # --- what the base has, for those who take this for one ---------------------------------------------------------

    @property
    def base(self) -> PreTrainedModel:
        """The frozen base; as it was loaded, whenever the compressor is not running."""
        return self.compressor.base

    @property
    def window(self) -> int | None:
        """Tokens of a row that the base's window has room for behind the memories; None: any number."""
        return self.compressor.room

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

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of texts. Raises UnsupportedModelError where the base has none."""
        return self.reader.tokenizer

    # --- the parts --------------------------------------------------------------------------------------------------

    def _retrieved(self, ids: Tensor, mask: Tensor, top_k: int | None, where: Where | None) -> Found | None:
        """What there is for each question; None if there is nothing for any of them."""
        if self._given is not None:
            if where is not None:
                raise UsageError("where asks for metadata, and memories that are given have none. Leave it out.")
        elif self._bank_path is None or not self.bank.memories:
            return None
        question = self.reader.compressed(ids, mask)
        keys, count = pooled(question), self._top_k(top_k)
        if self._given is not None:
            near = nearest(keys, self._given, count)
        else:
            hits = self.bank.search(keys, count, where)
            near = [[(hit.similarity, hit.block) for hit in row] for row in hits]
        return found_for(question, near, self.settings.min_similarity)

    def _top_k(self, top_k: int | None) -> int:
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise UsageError(f"top_k is {top_k!r}; it must be a whole number of at least 1.")
        return top_k or self.settings.top_k

    def _in_front(self, inputs: dict[str, Any], memory: Tensor, having: Tensor | None = None) -> dict[str, Any]:
        """The inputs of the base for rows with a prefix in front of them; `having`: bool [B], which rows have one."""
        for name in ("past_key_values", "position_ids"):
            if inputs.get(name) is not None:
                raise UsageError(f"{name} cannot be given: the memories come in front of it. Use generate().")
        self._check_room(inputs["input_ids"].shape[1])
        cache = DynamicCache(config=self.base.config)
        fill(cache, self.prefix(memory), self.base.dtype)
        mask = self._with_prefix(inputs["attention_mask"], having)
        changed = {"past_key_values": cache, "attention_mask": mask, "use_cache": True}
        if self.compressor.takes_positions:
            positions = (mask.long().cumsum(1) - 1).clamp(min=0)
            changed["position_ids"] = positions[:, self.settings.memory_tokens :]
        return inputs | changed

    def _check_room(self, tokens: int) -> None:
        if self.window is not None and tokens > self.window:
            raise UsageError(
                f"A row has {tokens} tokens, and the base's window has room for {self.window} behind the memories. "
                "Shorten it (in a recipe: train.max_length, or the task's max_length)."
            )

    def _with_prefix(self, mask: Tensor, having: Tensor | None = None) -> Tensor:
        """The attention mask [B, k + T] of rows with a prefix."""
        rows = torch.ones(len(mask), dtype=torch.bool, device=mask.device) if having is None else having
        return torch.cat((rows.to(mask.dtype)[:, None].expand(-1, self.settings.memory_tokens), mask), dim=1)
