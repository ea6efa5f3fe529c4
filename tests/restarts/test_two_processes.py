"""Two processes that train one model draw the same weights, and the first one chooses."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

import forking
import regrow
from relatives import X, net, train


def test_two_processes_stay_together(tmp_path):
    def run(rank):
        (tmp_path / f"rank{rank}").mkdir()
        return forking.script(__file__, tmp_path, rank, folder=tmp_path / f"rank{rank}")

    with ThreadPoolExecutor() as pool:
        for done in pool.map(run, range(2)):
            assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["told"] == two["told"]
    assert any(one["told"]["continual"])
    assert one["told"]["redo"]["dormant"]
    for kind, state in one["states"].items():
        for name, tensor in state.items():
            assert "running" in name or torch.equal(tensor, two["states"][kind][name]), (kind, name)


def run_as_one_of_two(folder, rank):
    # Imported once a group is there, its default arguments would hold the group for good: DDP imports it.
    import torch.distributed.nn

    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    start_anew_as_one_of_two(folder, rank)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    gc.collect()


def start_anew_as_one_of_two(folder, rank):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    wrapped = nn.parallel.DistributedDataParallel(model)
    mine = X * (1 + rank) + rank  # each process sees other pictures
    told, states = {}, {}
    torch.manual_seed(rank)  # and has other random numbers

    def note(kind, record):
        told[kind] = record
        train(wrapped, optimizer, 1, mine)
        states[kind] = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    train(wrapped, optimizer, 2, mine)
    note("shrink", regrow.shrink_and_perturb(wrapped, optimizer, seed=1))
    fresh = nn.Sequential(*net())
    with torch.no_grad():
        fresh[10].weight.normal_()
    note("head", regrow.reinitialize(wrapped, optimizer, last=1, fresh=fresh))
    arguments = {"batches": [mine], "example_inputs": X[:1], "threshold": 0.7}
    note("redo", regrow.redo(wrapped, optimizer, **arguments))
    method = regrow.ContinualBackprop(
        wrapped, optimizer, example_inputs=X[:1], rate=0.1, maturity=1, decay=0.5
    )
    chosen = []
    for _ in range(6):
        train(wrapped, optimizer, 1, mine)
        chosen.append(method.step())
    note("continual", chosen)
    method.remove()
    note("evolution", regrow.KnowledgeEvolution(wrapped).evolve(optimizer))
    sparse = regrow.DenseSparseDense(wrapped, optimizer)
    note("sparse", sparse.sparsify())
    note("dense", sparse.densify())
    torch.save({"told": told, "states": states}, f"{folder}/{rank}.pt")


if __name__ == "__main__":
    run_as_one_of_two(sys.argv[1], int(sys.argv[2]))
