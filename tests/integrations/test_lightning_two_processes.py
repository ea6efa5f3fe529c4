"""Two processes of a DDP fit of Lightning's drop and restore the same filters of a part of the module."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

import forking
from killing import variables_of_two


def test_the_first_of_two_processes_decides_for_all(tmp_path):
    def train(variables):
        rank = variables["RANK"]
        (folder := tmp_path / f"in{rank}").mkdir()
        return forking.script(__file__, tmp_path, rank, folder=folder, variables=variables)

    with ThreadPoolExecutor() as pool:
        for done in pool.map(train, variables_of_two()):
            assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["events"] == two["events"]
    assert [event["kind"] for event in one["events"]] == ["drop", "restore"]
    assert one["narrow"] == two["narrow"] == ["NarrowConv2d", "NarrowConv2d"]
    for name, tensor in one["model"].items():
        assert "running" in name or torch.equal(tensor, two["model"][name]), name


def train_as_one_of_two(folder, rank):
    import lightning.pytorch as pl
    import torch.distributed.nn
    from torch import nn

    from regrow.integrations.lightning import RePr

    class Fits(pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(),
                nn.Flatten(), nn.Linear(24, 3),
            )  # fmt: skip
            self.kinds = []

        def training_step(self, batch, _):
            if self.current_epoch == 1:
                self.kinds = [type(self.net[0]).__name__, type(self.net[3]).__name__]
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

        def train_dataloader(self):
            x = torch.randn(16, 1, 6, 6, generator=torch.Generator().manual_seed(1))
            return torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(x, torch.arange(16) % 3), batch_size=4
            )

    def apart(_):
        """Scores by which each process, if it decided for itself, would drop other filters."""
        order = torch.arange(6.0)
        return {"0": torch.arange(4.0), "3": order if rank == 0 else -order}

    callback = RePr(
        torch.zeros(1, 1, 6, 6), criterion=apart, compact=True, skip_first=False, full=1, sub=1, cycles=1
    )
    fit = Fits()
    pl.Trainer(
        max_epochs=3, callbacks=[callback], accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(fit)  # fmt: skip
    events = [event.to_dict() for event in callback.events]
    found = {"events": events, "model": fit.net.state_dict(), "narrow": fit.kinds}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    gc.collect()


if __name__ == "__main__":
    train_as_one_of_two(sys.argv[1], int(sys.argv[2]))
