"""Two processes that each see a part of the batch have the clusters of one that sees all of it."""

import runpy
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

CASES = {
    # per step, the rows of the batch that the first process gets; the second gets the others
    "halves": [2, 2, 2],
    "one without a token": [4, 0, 1, 4],  # also at the start
    "the first without a token": [0, 3],
}


def make_model(make_base):
    from twinweave.slim import SlimConfig, get_slim_model

    torch.manual_seed(3)
    config = SlimConfig(r=2, num_experts=3, num_clusters=2, cluster_rate=0.2)
    return get_slim_model(make_base(), config).train()


def batch_of(seed):
    ids = torch.randint(3, 61, (4, 9), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, 6:] = 0
    return ids, mask


@torch.no_grad()
def clusters_after(model, case, rank=None):
    """Buffers after the case's steps; without a rank, those of one process with the whole batches."""
    for seed, first in enumerate(CASES[case]):
        ids, mask = batch_of(seed)
        if rank is not None:
            rows = slice(0, first) if rank == 0 else slice(first, None)
            # where there is no row, one whose tokens are all padding
            ids, mask = (ids[rows], mask[rows]) if len(ids[rows]) else (ids[:1], torch.zeros_like(mask[:1]))
        model(input_ids=ids, attention_mask=mask)
    return {n: b.clone() for n, b in model.state_dict().items() if "slim_clusters" in n}


def run_rank(rank, port, folder):
    """In a process of its own: all cases."""
    torch.set_num_threads(1)
    make_base = runpy.run_path(str(Path(__file__).parents[1] / "conftest.py"))["make_base_model"]
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save({case: clusters_after(make_model(make_base), case, rank) for case in CASES}, folder / f"{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of_both(tmp_path_factory):
    """What each of the processes found, by case."""
    context, folder = multiprocessing.get_context("forkserver"), tmp_path_factory.mktemp("ranks")
    context.set_forkserver_preload(["twinweave.compare"])
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    # by file, since test modules cannot be imported by another process
    processes = [
        context.Process(target=runpy.run_path, args=(__file__, {"JOB": (rank, port, folder)}, "__rank__"))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    hung = [process for process in processes if process.is_alive()]
    for process in hung:
        process.kill()
    assert not hung
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_clusters_are_those_of_one_process(case, of_both, make_base):
    first, second = (found[case] for found in of_both)
    expected = clusters_after(make_model(make_base), case)
    assert {int(t) for n, t in expected.items() if n.endswith("batches")} == {len(CASES[case])}
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], tensor, rtol=1e-4, atol=1e-5)


if __name__ == "__rank__":
    run_rank(*JOB)  # noqa: F821  # given by run_path
