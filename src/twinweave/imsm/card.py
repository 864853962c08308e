"""The model card of a saved model: what it is, and how it is loaded. Knows nothing about hubs."""

import os
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import ModelCard

_HEADING = "## Two memories"
_TEXT = """## Two memories

This folder is a PEFT adapter with a gate beside it: the base model is frozen, and token by token the gate decides how
much of what is said comes from the base, and how much from the adapter (IMSM, arXiv 2412.17383).

```python
import twinweave as tw

model = tw.IMSMModel.from_pretrained("{where}")   # the base is found by its recorded name, and checked
with model.use_memory("original"): ...   # the base alone; "enhanced" is the adapter alone, as plain PEFT loads it
model.retention = 1.0                    # more of the base; 0 is as trained
```
"""
_TAGS = ("imsm", "twinweave")


def tags_in(folder: str | os.PathLike[str]) -> list[str]:
    """The tags of the card in `folder`."""
    return list(ModelCard.load(Path(folder) / "README.md").data.get("tags") or ())


def write(folder: str | os.PathLike[str], name: str = "path/to/this/folder", tags: Iterable[str] = ()) -> None:
    """Add to the card in `folder` what this library has to say, and more `tags`; once, however often it is done.

    `name`: what the model is loaded by.
    """
    file = Path(folder) / "README.md"
    card = ModelCard.load(file)
    card.data["tags"] = sorted({*tags_in(folder), *tags, *_TAGS})
    if _HEADING not in card.text:
        card.text = f"{card.text.rstrip()}\n\n{_TEXT.format(where=name)}"
    card.save(file)
