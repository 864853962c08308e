"""`twinweave generate`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.text import Text

from ..cmt import MemoryModel
from ..data import encode_prompt
from ..errors import UsageError
from ..evaluation import has_lens, original_shares, token_texts
from ..evaluation.generate import greedy_settings, no_own_settings
from ..genadapter import GenerativeAdapter
from ..progress import say
from ..training import load_window
from ..training.base import window_of
from .adapters import answering
from .shared import MemoryOption, RetentionOption, dialled, open_run, out


def generate(
    run: Annotated[
        Path, typer.Argument(help="The folder of a finished run, or of one of its models; with --adapter, of a reader.")
    ],
    prompt: Annotated[str, typer.Argument(help="What the model is asked.")],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="The most tokens to write (64, or half the window if that is less).")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 writes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    chat: Annotated[bool, typer.Option(help="Put the prompt through the tokenizer's chat template.")] = False,
    lens: Annotated[bool, typer.Option(help="Show how much of each token came from the original memory.")] = False,
    adapter: Annotated[
        list[Path] | None,
        typer.Option(help="Answer from what `read` wrote into this folder; of several, from all. RUN may be pocket."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base lies now, if it has moved.")] = None,
    memory: MemoryOption = None,
    retention: RetentionOption = None,
) -> None:
    """Ask a trained model, or one that has read texts.

    Example: `twinweave generate runs/reverse "Reverse the words board moon kite." --lens`

    Example: `twinweave generate pocket "What is the pet of Wanda Crane?" --adapter wanda`
    """
    model: Any
    if adapter:
        model, state = answering(str(run), adapter, base)
        tokenizer, window, having_read = model.tokenizer, window_of(model.config), model.adapted(state)
    else:
        if str(run) == "pocket" and not run.exists():
            raise UsageError(
                "pocket is the reader that is shipped, and answers from what it has read. Name the folder of that with "
                "--adapter; `twinweave read TEXT --out FOLDER` makes one."
            )
        model, tokenizer, recipe = open_run(run, base)
        window, having_read = load_window(recipe.base), nullcontext()
        if isinstance(model, GenerativeAdapter):
            say("nothing was read, so the base answers; name what `read` wrote with --adapter")
        if isinstance(model, MemoryModel):
            say("no bank is open here, so the base answers; `twinweave memory ask` answers from one")
    max_new_tokens = max_new_tokens or min(64, window // 2)
    if window <= max_new_tokens:
        raise UsageError(
            f"--max-new-tokens {max_new_tokens} leaves no room for a prompt: the window is {window} tokens."
        )
    question = [{"role": "user", "content": prompt}] if chat else prompt
    ids, cut = encode_prompt(question, tokenizer, max_length=window - max_new_tokens)
    if cut:
        raise UsageError(
            f"The prompt does not fit: the window is {window} tokens, {max_new_tokens} of them for the answer. "
            "Shorten the prompt or lower --max-new-tokens."
        )
    with having_read, dialled(model, memory, retention):
        if lens:
            if not has_lens(model) or temperature > 0:
                raise UsageError("--lens reads the gate of an IMSM model, or SLIM's routers, at temperature 0.")
            written, shares = original_shares(model, tokenizer, ids, max_new_tokens)
            out.print(_coloured(token_texts(tokenizer, written), shares))
            return
        torch.manual_seed(seed)
        inputs = torch.tensor([ids], device=next(model.parameters()).device)
        settings = greedy_settings(model, tokenizer, max_new_tokens)
        if temperature > 0:
            settings.do_sample, settings.temperature = True, temperature
        with no_own_settings(model):
            answer = model.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), generation_config=settings
            )
    typer.echo(str(tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True)).strip())


def _coloured(texts: list[str], shares: list[float]) -> Text:
    """Tokens with the original memory's share behind each, in blue where it leads and in orange where it does not."""
    line = Text()
    for text, share in zip(texts, shares, strict=True):
        line.append(text, style="bold dodger_blue2" if share >= 0.5 else "bold dark_orange")
        line.append(f"·{share:.0%}", style="dim")
    return line
