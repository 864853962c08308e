"""What several commands share: printing results, opening a trained model again. No command lives here."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from .. import pocket
from ..cmt import MemoryModel
from ..cmt.saving import CONFIG_NAME as MEMORY_NAME
from ..compare import find_model
from ..compare.store import RESULTS_NAME, read_results
from ..errors import BaseMismatchError, DamagedFileError, UsageError
from ..fingerprint import fingerprint
from ..genadapter import GenerativeAdapter
from ..genadapter.saving import CONFIG_NAME
from ..imsm import IMSMModel
from ..methods import load_plain
from ..processes import is_first
from ..report import build_report, terminal_tables
from ..training import Recipe, load_base, load_recipe, load_tokenizer
from ..training.base import default_device

# Results go to standard output, progress and errors to standard error.
out = Console()

MemoryOption = Annotated[str | None, typer.Option(help="original, enhanced or interwoven (the default).")]
RetentionOption = Annotated[
    float | None, typer.Option(help="Added to the gate's logits: larger keeps more of the original memory.")
]
OVERRIDES_HELP = "Settings that replace the recipe's, such as training.epochs=1 or seeds=[0]."


def show(results: dict[str, Any], folder: Path) -> None:
    """Tables with the finding, and the path of the report, which is written into `folder`; of several processes the
    first shows it."""
    if not is_first():
        return
    for table in terminal_tables(results):
        out.print(table)
    path = build_report([results], folder / "report.html")
    print(f"results: {folder / RESULTS_NAME}")
    print(f"report:  {path}")


def lasting(where: str | None) -> str | None:
    """A folder by its whole path, so that it is found from elsewhere too; names as they are."""
    return str(Path(where).resolve()) if where not in (None, "pocket") and Path(str(where)).is_dir() else where


def locate(run: Path) -> tuple[Path, Path]:
    """The folder of a run's trained model, and that of the whole run."""
    folder = find_model(run)
    owner = next((p for p in (run, *run.parents) if (p / RESULTS_NAME).is_file()), None)
    if owner is None:
        raise DamagedFileError(f"{run} belongs to no finished run ({RESULTS_NAME} is missing).")
    return folder, owner


def open_run(run: Path, base: str | None = None) -> tuple[Any, PreTrainedTokenizerBase, Recipe]:
    """The trained model of a run, its tokenizer, and the recipe it came from."""
    folder, owner = locate(run)
    results = read_results(owner)
    recipe = load_recipe(results["recipe"])
    if base is not None:
        recipe.base.name = base
    tokenizer, model = load_tokenizer(recipe.base), load_base(recipe.base)
    if (folder / CONFIG_NAME).is_file():
        return GenerativeAdapter.from_pretrained(str(folder), model, tokenizer=tokenizer), tokenizer, recipe
    if (folder / MEMORY_NAME).is_file():
        return MemoryModel.from_pretrained(str(folder), model, tokenizer=tokenizer), tokenizer, recipe
    if (folder / "imsm_config.json").is_file():
        return IMSMModel.from_pretrained(str(folder), model), tokenizer, recipe
    trained_on, found = results["base"]["fingerprint"], str(fingerprint(model))
    if trained_on != found:
        raise BaseMismatchError(
            f"{folder} was trained on another base than '{recipe.base.name}' (fingerprint {trained_on} against "
            f"{found}). Say where its own base lies with --base."
        )
    return load_plain(str(folder), model).eval(), tokenizer, recipe


def open_reader(where: str, base: str | None = None, dtype: str = "float32") -> GenerativeAdapter:
    """A saved generator of adapters on its base, ready to read and to answer.

    `where`: the folder of a generator, that of a run with one, or `pocket`. `base`: where the base lies now; `dtype`:
    its precision. Raises UsageError where there is no generator, and what GenerativeAdapter.from_pretrained raises.
    """
    shipped = where == "pocket"
    run = pocket.reader_dir() if shipped else Path(where)
    folders = [run, run / "best", *sorted(run.glob("cells/*/best"))]
    folder = next((folder for folder in folders if (folder / CONFIG_NAME).is_file()), None)
    if folder is None:
        raise UsageError(
            f"There is no generator of adapters in {where} ({CONFIG_NAME} is missing). Give the folder of one, of "
            "a run that trained one, or pocket."
        )
    if shipped and base is None:
        base = str(pocket.base_dir())
    reader = GenerativeAdapter.from_pretrained(folder, base, dtype=getattr(torch, dtype))
    return reader.to(default_device())


@contextmanager
def dialled(model: Any, memory: str | None, retention: float | None) -> Iterator[None]:
    """Use the model with the memory and retention asked for on the command line."""
    if memory is None and retention is None:
        yield
        return
    if not isinstance(model, IMSMModel):
        kinds = {GenerativeAdapter: "is a reader (GenerativeAdapter)", MemoryModel: "is a memory model (CMT)"}
        held = kinds.get(type(model), "holds a plain adapter")
        raise UsageError(f"--memory and --retention are for IMSM models; this run {held}.")
    if retention is not None:
        model.retention = retention
    with model.use_memory(memory or "interwoven"):  # type: ignore[arg-type]
        yield
