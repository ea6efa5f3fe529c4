"""Two processes that train one model choose, drop and restore the same filters."""

import copy
import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn

import forking
from cycles import X, build, fit, sgd, widths
from regrow.repr.cycle import RePr
from regrow.repr.restart import restart


def test_two_processes_stay_together(tmp_path):
    def train(rank):
        (tmp_path / f"rank{rank}").mkdir()
        return forking.script(__file__, tmp_path, rank, folder=tmp_path / f"rank{rank}")

    with ThreadPoolExecutor() as pool:
        for done in pool.map(train, range(2)):
            assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["widths"] == two["widths"]
    assert sum(one["widths"].values()) == 22 - 7
    assert one["events"] == two["events"]
    assert [event["kind"] for event in one["events"] if event] == ["drop", "restore"]
    for name, tensor in one["model"].items():
        assert "running" in name or torch.equal(tensor, two["model"][name]), name
    for kind in ("drop", "restore"):
        one, two = (torch.load(tmp_path / f"{kind}{rank}.pt", weights_only=True) for rank in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one)
    one, two = (torch.load(tmp_path / f"at_once{rank}.pt", weights_only=True) for rank in range(2))
    for kind, found in one.items():
        assert found["said"] == two[kind]["said"]
        assert found["said"]["filters"]
        assert all(torch.equal(tensor, two[kind]["weights"][key]) for key, tensor in found["weights"].items())


def run_as_one_of_two(folder, rank):
    # Imported once a group is there, its default arguments would hold the group for good: DDP imports it.
    import torch.distributed.nn

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    train_as_one_of_two(folder, rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    gc.collect()
    # A thread of gloo's that still runs when the interpreter ends would now and then abort the process.
    left = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    assert not [name for name in left if "gloo" in name], left


def train_as_one_of_two(folder, rank):
    model = build()
    optimizer = sgd(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    cycle = RePr(
        wrapped, optimizer, example_inputs=X[:1], full=2, sub=4, cycles=1, skip_first=False, consumers="init"
    )
    seen, events = {}, []
    for step in range(8):
        if cycle.phase == "sub":
            seen = widths(model)
        fit(wrapped, optimizer, 2 * step + rank)
        if rank == 1 and step in (1, 5):
            # As if this process had rounded otherwise, so that it would choose and regrow differently.
            with torch.no_grad():
                model.conv2.weight.copy_(model.conv2.weight.flip(0))
        events.append(cycle.step())
        if events[-1] is not None:
            torch.save(model.state_dict(), f"{folder}/{events[-1].kind}{rank}.pt")
    events = [event and event.to_dict() for event in events]
    trained = copy.deepcopy(model.state_dict())
    at_once = restart_as_one_of_two(model, optimizer, wrapped, rank)
    torch.save(at_once, f"{folder}/at_once{rank}.pt")
    check_that_errors_reach_both(model, optimizer, wrapped, rank)
    torch.save({"model": trained, "widths": seen, "events": events}, f"{folder}/{rank}.pt")


def restart_as_one_of_two(model, optimizer, wrapped, rank):
    """The net after a restart by ``RePr(sub=0)``, after one by ``restart``, and what both return."""
    cycle = RePr(wrapped, optimizer, example_inputs=X[:1], full=1, sub=0, cycles=1, consumers="init")
    found = {}
    for kind in ("cycle", "restart"):
        fit(wrapped, optimizer, rank)
        if rank == 1:
            with torch.no_grad():
                model.conv3.weight.copy_(model.conv3.weight.flip(0))
        if kind == "cycle":
            said = cycle.step().to_dict()
        else:
            said = restart(wrapped, optimizer, example_inputs=X[:1], rows="init")
        found[kind] = {"said": said, "weights": copy.deepcopy(model.state_dict())}
    return found


def check_that_errors_reach_both(model, optimizer, wrapped, rank):
    again = RePr(wrapped, optimizer, example_inputs=X[:1], full=1, sub=1, cycles=1)
    good = model.conv2.weight.detach().clone()
    if rank == 0:
        model.conv2.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="conv2"):
        again.step()
    model.conv2.weight.data.copy_(good)


if __name__ == "__main__":
    run_as_one_of_two(sys.argv[1], int(sys.argv[2]))
