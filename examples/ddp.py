"""RePr and Bridgeout in several processes (DDP): one process a GPU, or several on a CPU.

torchrun --standalone --nproc-per-node 2 examples/ddp.py
"""

import gc
import os

import torch
import torch.distributed as dist
import torch.distributed.nn  # DDP imports it; where there is a group, its default arguments hold it
from sklearn.datasets import load_digits
from torch import Tensor, nn

import regrow

EPOCHS = 12


def join() -> torch.device:
    """Connect the processes that torchrun has started, or be the only one; the device of this one."""
    device = torch.device("cpu")
    if torch.cuda.is_available():  # with no more processes than GPUs
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # Each of several processes would take all cores, and wait for the others.
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **alone)
    return device


def train(images: Tensor, labels: Tensor, device: torch.device) -> nn.Module:
    rank, processes = dist.get_rank(), dist.get_world_size()
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    ).to(device)  # fmt: skip
    # With one seed in all processes the noise is the same in all, as the gradients are.
    regrow.add_bridgeout(model, p=0.1, seed=0)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, (EPOCHS - epoch) / 6))
    # RePr gets the wrapper: by it RePr knows that the processes train one network, and the first one decides.
    cycle = regrow.RePr(
        wrapped, optimizer, fraction=0.3, full=2, sub=2, cycles=1, compact=True, example_inputs=images[:1]
    )
    for epoch in range(1, EPOCHS + 1):
        wrapped.train()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        for chosen in order[: len(order) // 64 * 64].split(64):
            mine = chosen[rank::processes].to(device)
            optimizer.zero_grad()
            nn.functional.cross_entropy(wrapped(images[mine]), labels[mine]).backward()
            optimizer.step()
        scheduler.step()
        event = cycle.step()  # in every process
        if event and rank == 0:
            print(f"epoch {epoch}: {event.kind}", {name: len(found) for name, found in event.filters.items()})
    cycle.remove()
    regrow.remove_bridgeout(model)
    return model


def check_equal(model: nn.Module) -> None:
    """Fail unless all processes have the same weights, bit for bit."""
    for name, parameter in model.named_parameters():
        parts = [torch.empty_like(parameter) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, parameter.detach().contiguous())
        assert all(torch.equal(parts[0], part) for part in parts), name


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    device = join()
    images = (torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16).to(device)
    labels = torch.tensor(digits.target).to(device)
    model = train(images[:1400], labels[:1400], device)
    check_equal(model)
    if dist.get_rank() == 0:
        # Each process has norms with statistics of its own pictures: save and measure those of one process.
        with torch.inference_mode():
            found = model.eval()(images[1400:]).argmax(1)
        accuracy = (found == labels[1400:]).float().mean().item()
        print(f"{dist.get_world_size()} processes, equal weights, test accuracy {accuracy:.2%}")
    gc.collect()  # DDP's wrapper is part of a cycle: it goes before the group that it uses
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
