"""The compressor: the base itself, with an adapter that is on for compression only, and learned tokens behind the text.

The last hidden states of those tokens are the memory of the text. Knows nothing about banks, questions or losses.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModelForCausalLM, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..decoder import decoder_of
from ..errors import UsageError


class Compressor(nn.Module):
    """Theta. Outside of `forward` the adapter is off, and the base is as it was."""

    def __init__(self, base: PreTrainedModel, adapter: PeftConfig, memory_tokens: int) -> None:
        super().__init__()
        decoder = decoder_of(base)
        assert decoder is not None
        self.peft = cast(PeftModelForCausalLM, get_peft_model(base, adapter))
        self.takes_positions = takes_positions(decoder)
        with torch.no_grad():  # there are bases whose embeddings are of another size
            token = torch.zeros(1, 1, dtype=torch.long, device=base.device)
            self.width = int(decoder(input_ids=token, use_cache=False)[0].shape[-1])
        self._layers = [m for m in self.peft.modules() if isinstance(m, BaseTunerLayer)]
        embeddings = embeddings_of(base).float()
        start = torch.randn(memory_tokens, embeddings.shape[1], device=embeddings.device)
        self.tokens = nn.Parameter(embeddings.mean(0) + start * embeddings.std(0))
        self._on = False
        self._switch(on=False)
        self.train(self.training)

    @property
    def base(self) -> PreTrainedModel:
        """The base, adapted or not."""
        return cast(PreTrainedModel, self.peft.get_base_model())

    @property
    def decoder(self) -> nn.Module:
        """The base without its head."""
        return cast(nn.Module, decoder_of(self.base))

    def start_from(self, token_ids: list[int]) -> None:
        """Let the memory tokens start as the embeddings of these tokens, repeated as often as it takes."""
        if not token_ids:
            raise UsageError("init_text has no tokens for this tokenizer. Give a text of at least a word.")
        places = torch.arange(len(self.tokens)) % len(token_ids)
        embeddings = embeddings_of(self.base)
        with torch.no_grad():
            self.tokens.copy_(embeddings[torch.tensor(token_ids)[places].to(embeddings.device)])

    @property
    def room(self) -> int | None:
        """Tokens that the base's window has beside the memory tokens; None where it has none."""
        window = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        return max(window - len(self.tokens), 1) if isinstance(window, int) and window > 0 else None

    @contextmanager
    def active(self) -> Iterator[None]:
        """The adapter is on within the block, which may be in another one: checkpointed layers are, in the forward
        pass, and may have layers of their own."""
        before, self._on = self._on, True
        self._switch(on=True)
        try:
            yield
        finally:
            self._on = before
            self._switch(on=before)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The memories [B, k, D] in float32 of texts [B, T], padded on either side."""
        k = len(self.tokens)
        ids, mask = padded_first(ids, mask)
        if self.room is not None:  # a longer text loses its start
            ids, mask = ids[:, -self.room :], mask[:, -self.room :]
        ids = torch.cat((ids, ids[:, -1:].expand(-1, k)), dim=1)  # whatever stands there, the hook replaces it
        mask = torch.cat((mask, mask.new_ones(len(mask), k)), dim=1)
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if self.takes_positions:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)

        def put_tokens(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            own = self.tokens.to(output.dtype).expand(len(output), -1, -1)
            return torch.cat((output[:, :-k], own), dim=1)

        handle = self.base.get_input_embeddings().register_forward_hook(put_tokens)
        try:
            with self.active():
                states: Tensor = self.decoder(**given)[0]
        finally:
            handle.remove()
        return states[:, -k:].float()

    def train(self, mode: bool = True) -> "Compressor":
        """As in torch for the adapter; the base stays in evaluation mode, since its dropout would blur what is read."""
        super().train(mode)
        self.base.eval()
        for layer in self._layers:
            for name, child in cast(nn.Module, layer).named_children():
                if name != "base_layer":
                    child.train(mode)
        return self

    def own_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What is not the base's, with names that do not depend on it."""
        adapter = [(name, parameter) for name, parameter in self.peft.named_parameters() if self.prefix in name]
        return [*adapter, ("tokens", self.tokens)]

    @property
    def prefix(self) -> str:
        """What names of the adapter's parameters have in them."""
        tuner: Any = self.peft.base_model
        return str(tuner.prefix)

    def _switch(self, on: bool) -> None:
        # the layers' own flag; PEFT's enable and disable also reset `requires_grad`
        for layer in self._layers:
            layer._disable_adapters = not on


def padded_first(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [B, T] with all padding in front of their tokens, which stay in order."""
    order = mask.long().argsort(dim=1, stable=True)
    return ids.gather(1, order), mask.long().gather(1, order)


def embeddings_of(base: PreTrainedModel) -> Tensor:
    """The input embeddings [V, D] as the decoder gets them: there are bases whose embeddings scale what they hold."""
    table: Any = base.get_input_embeddings()
    with torch.no_grad():
        return cast(Tensor, table(torch.arange(len(table.weight), device=table.weight.device)))


def takes_positions(decoder: nn.Module) -> bool:
    """Whether a decoder can be told the position of each token."""
    return "position_ids" in inspect.signature(decoder.forward).parameters
