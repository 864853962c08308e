"""The command line: one file per command, each a few lines around the library.

Exit codes: 0 done, 1 failed, 2 the request is malformed.
"""

import errno
import gc
import logging
import os
import sys
import warnings

import typer
from rich.markup import escape

from ..errors import TwinweaveError
from ..progress import console
from .compare import compare
from .demo import demo
from .env import env
from .evaluate import evaluate
from .forget import forget
from .generate import generate
from .memory import memory
from .methods import methods
from .read import read
from .report import report
from .tasks import tasks
from .train import train
from .validate import validate

app = typer.Typer(
    help="Teach a language model something new without erasing what it knew.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    add_completion=False,
)
for _command in (demo, train, compare, evaluate, generate, read, forget, report, validate, tasks, methods, env):
    app.command()(_command)
app.add_typer(memory, name="memory")


# No space, over quota, too large, no permission, read-only, a file for a folder: only the user can do something.
_MENDED_OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def main() -> None:
    """Run the command line; our own errors become one sentence and an exit code."""
    _quieten_libraries()
    gc.freeze()  # what the imports made stays anyway; without it each collection between cells takes half a second
    try:
        app()
    except TwinweaveError as error:
        _say_error(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in _MENDED_OUTSIDE:
            raise
        _say_error(f"{error}. See to it and run the same command to go on.")
        sys.exit(1)
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here" if _goes_on() else "stopped")
        sys.exit(130)


def _goes_on() -> bool:
    """Whether the command that was called keeps what it has done so far when it is stopped."""
    return sys.argv[1:2] in (["demo"], ["train"], ["compare"]) or sys.argv[1:3] == ["memory", "add"]


def _say_error(message: str) -> None:
    console.print(f"[bold red]error:[/bold red] {escape(message)}", soft_wrap=True, highlight=False)


def _quieten_libraries() -> None:
    """Warnings of the libraries below us are ours to heed, not the user's; TWINWEAVE_DEBUG=1 shows them."""
    if os.environ.get("TWINWEAVE_DEBUG"):
        return
    from transformers.utils import logging as transformers_logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for name in ("accelerate", "bitsandbytes", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
