"""Each kind of training loop × RePr, Bridgeout and both × a run that ends, breaks off, goes on.

``loops`` has the loops and the methods. The loops of two processes run all their cells in one pair of them.
"""

from __future__ import annotations

import gc
import itertools
import json
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import forking
import regrow
from cycles import X, hooks
from loops import BATCHES, EPOCHS, FULL, IN_TWO_PROCESSES, LOOPS, METHODS, SUB, Broken, Loop
from regrow.marks import states_of

IN_SUB_PHASE = FULL + 1  # epochs after which one epoch of the sub phase is over
NORMS = {"stem": "norm", "a": "norm_a", "b": "norm_b"}


def check_dead(loop: Loop) -> None:
    """Dropped filters, and the norms behind them, are 0 in the model and in what follows it."""
    if loop.cycle is None:
        return
    for whose, tensors in loop.weights().items():
        for layer, mask in loop.cycle.keep.items():
            norm = NORMS[layer]
            for name in (f"{layer}.weight", f"{layer}.bias", f"{norm}.weight", f"{norm}.bias"):
                assert not tensors[name][~mask].any(), (whose, name)


def check_plain(loop: Loop, expected: Tensor) -> None:
    """Nothing of regrow's is left, and a new net with the same weights computes the same."""
    assert states_of(loop.model) == {}
    plain = loop.build()
    assert [type(module) for module in loop.model.modules()] == [type(module) for module in plain.modules()]
    assert hooks(loop.model, loop.optimizer) == 0
    plain.load_state_dict(loop.model.state_dict())
    assert all(tensor.isfinite().all() for tensors in loop.weights().values() for tensor in tensors.values())
    with torch.no_grad():
        computed = evaluated(loop)
        assert torch.equal(computed, plain.eval()(X))
    torch.testing.assert_close(computed, expected)
    with torch.no_grad():  # last, because DDP takes over the statistics of the first process
        torch.testing.assert_close(loop.net.eval()(X), loop.model(X))


def evaluated(loop: Loop) -> Tensor:
    with torch.no_grad():
        return loop.model.eval()(X)


def same(one: Loop, other: Loop) -> None:
    for whose, tensors in one.weights().items():
        theirs = other.weights()[whose]
        assert tensors.keys() == theirs.keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, theirs[name]), (whose, name)


def trained(kind: type[Loop], method: str, _folder: Path) -> None:
    """The run goes through: events in time, dead filters, as many draws as passes, a plain net at the end."""
    loop = kind(method)
    loop.watch = lambda: check_dead(loop)
    events = {}
    for epoch in range(EPOCHS):
        event = loop.epoch(epoch)
        loop.agree()
        if event is not None:
            events[epoch + 1] = event.kind
            assert {name: len(filters) for name, filters in event.filters.items()} == {"a": 2, "b": 2}
        if loop.cycle is not None and loop.cycle.phase == "sub":
            check_dead(loop)
            assert not all(mask.all() for mask in loop.cycle.keep.values())
    assert events == ({FULL: "drop", FULL + SUB: "restore"} if loop.with_repr else {})
    if loop.with_noise:
        assert regrow.bridgeout_state(loop.model)["passes"] == EPOCHS * BATCHES
    if loop.as_plain:
        plain = Loop(method)
        for epoch in range(EPOCHS):
            plain.epoch(epoch)
        for (name, ours), theirs in zip(loop.model.named_parameters(), plain.model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
    expected = evaluated(loop)
    loop.remove()
    check_plain(loop, expected)


def stopped(kind: type[Loop], method: str, _folder: Path) -> None:
    """An error breaks the run off in the sub phase, in a step: a plain net is left, which can train on."""
    loop = kind(method)
    for epoch in range(IN_SUB_PHASE):
        loop.epoch(epoch)
    loop.breaks = True
    with pytest.raises(Broken):
        loop.epoch(IN_SUB_PHASE)
    expected = evaluated(loop)
    if loop.cycle is not None:
        assert loop.cycle.phase == "sub"
        assert "in a cycle" in states_of(loop.model)
    check_dead(loop)
    loop.remove()
    loop.agree()
    check_plain(loop, expected)
    loop.optimizer.zero_grad()
    nn.functional.cross_entropy(loop.model.train()(X), torch.arange(len(X)) % 4).backward()
    loop.optimizer.step()
    assert all(p.isfinite().all() for p in loop.model.parameters())


def resumed(kind: type[Loop], method: str, folder: Path) -> None:
    """A run that goes on from a file of the sub phase ends at the bits of the one that went through."""
    through = kind(method)
    for epoch in range(IN_SUB_PHASE):
        through.epoch(epoch)
    through.save(folder)
    again = kind(method, seed=9)
    again.load(folder)
    if again.cycle is not None:
        assert again.cycle.phase == "sub"
        check_dead(again)
    for epoch in range(IN_SUB_PHASE, EPOCHS):
        events = [loop.epoch(epoch) for loop in (through, again)]
        assert events[0] == events[1]
        same(through, again)
    again.agree()


# end → (loop, method, folder) → fails if something is wrong
ENDS: dict[str, Callable[[type[Loop], str, Path], None]] = {
    "train": trained,
    "stop": stopped,
    "resume": resumed,
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop(loop: str, method: str, end: str, tmp_path: Path) -> None:
    ENDS[end](LOOPS[loop], method, tmp_path)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """{cell: what went wrong, or nothing} of each of two processes, which run the cells one after another."""
    folder = tmp_path_factory.mktemp("two_processes")

    def run(rank: int) -> dict[str, str]:
        (folder / f"in{rank}").mkdir()
        done = forking.script(__file__, folder, rank, folder=folder / f"in{rank}")
        assert done.returncode == 0, done.stderr
        return json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, range(2)))


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("loop", IN_TWO_PROCESSES)
def test_a_loop_of_two_processes(
    loop: str, method: str, end: str, two_processes: list[dict[str, str]]
) -> None:
    for rank, found in enumerate(two_processes):
        wrong = found.get(f"{loop}/{method}/{end}", "a cell before this one failed")
        assert not wrong, f"in process {rank}: {wrong}"


def run_as_one_of_two(folder: Path, rank: int) -> None:
    # Imported once a group is there, its default arguments would hold the group for good: DDP imports it.
    import torch.distributed.nn

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    found = run_cells(folder)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if any(found.values()):
        return
    dist.barrier()
    dist.destroy_process_group()
    gc.collect()


def run_cells(folder: Path) -> dict[str, str]:
    """{cell: what went wrong, or nothing}, up to the first cell that fails.

    The other process waits for this one in that cell, so neither can go on.
    """
    found: dict[str, str] = {}
    for name, method, end in itertools.product(IN_TWO_PROCESSES, METHODS, ENDS):
        cell, place = f"{name}/{method}/{end}", folder / str(len(found))
        place.mkdir(exist_ok=True)
        try:
            ENDS[end](IN_TWO_PROCESSES[name], method, place)
            found[cell] = ""
        except Exception:
            return {**found, cell: traceback.format_exc()}
    return found


if __name__ == "__main__":
    run_as_one_of_two(Path(sys.argv[1]), int(sys.argv[2]))
