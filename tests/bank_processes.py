"""What tests run in processes of their own: a bank that is written and read, to be killed at any moment."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from twinweave.cli import main
from twinweave.cmt import MemoryBank, MemoryModel


def add(file, bank, model, said):
    """`twinweave memory add` in batches of four documents; what it prints goes into the file `said`."""
    torch.set_num_threads(1)
    memorizing = MemoryModel.memorizing
    MemoryModel.memorizing = lambda self, documents: memorizing(self, documents, 4)
    sys.argv = ["twinweave", "memory", "add", str(file), "--bank", str(bank), "--model", str(model)]
    with Path(said).open("w") as out, redirect_stdout(out):
        main()


def read(bank, begun, rounds):
    """Search until there is a document "ready"; each found document has to be whole, and of one version."""
    torch.set_num_threads(1)
    while True:
        opened = MemoryBank(bank)
        ready = "ready" in opened.digests_of(["ready"])
        for hits in opened.search(torch.randn(2, opened.shape[1]), 50):
            parts = {}
            for hit in hits:
                assert (hit.block == hit.metadata["stamp"]).all(), "another document's memory"
                parts.setdefault(hit.id, []).append(hit)
            for found in parts.values():
                assert len({hit.metadata["stamp"] for hit in found}) == 1, "parts of two versions"
                assert sorted(h.part for h in found) == list(range(found[0].metadata["parts"])), "part of a document"
        with rounds.get_lock():
            rounds.value += 1
        begun.set()
        if ready:
            return
