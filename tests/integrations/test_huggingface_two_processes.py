"""Two processes of a Trainer's DDP, and of a loop with Accelerate, drop and restore the same filters."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import forking
from killing import variables_of_two

LOADS = pytest.mark.needs_torch("2.13", "the Trainer's own torch.load, for a device named cpu:0,")


@pytest.mark.parametrize(
    "with_trainer", [pytest.param(1, id="Trainer", marks=LOADS), pytest.param(0, id="Accelerate")]
)
def test_the_first_of_two_processes_decides_for_all(tmp_path, with_trainer):
    def train(variables):
        rank = variables["RANK"]
        (folder := tmp_path / f"in{rank}").mkdir()
        variables = {**variables, "ACCELERATE_USE_CPU": "true"}
        return forking.script(__file__, tmp_path, rank, with_trainer, folder=folder, variables=variables)

    with ThreadPoolExecutor() as pool:
        for done in pool.map(train, variables_of_two()):
            assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["events"] == two["events"]
    assert [event["kind"] for event in one["events"]] == ["drop", "restore"]
    for name, tensor in one["model"].items():
        assert "running" in name or torch.equal(tensor, two["model"][name]), name
    if with_trainer:
        assert one["again"] == two["again"] == ["restore"]
        assert len([*tmp_path.glob("out/checkpoint-*/regrow_repr.pt")]) == 3


def train_as_one_of_two(folder, rank, with_trainer):
    import torch.distributed as dist

    from resnets import X, Y, resnet

    def apart(model):
        """Scores by which each process, if it decided for itself, would drop other filters."""
        layers = {name: m.out_channels for name, m in model.named_modules() if isinstance(m, torch.nn.Conv2d)}
        return {name: torch.arange(float(n)) * (1 - 2 * rank) for name, n in layers.items()}

    settings = {"criterion": apart, "full": 1, "sub": 1, "cycles": 1}
    found = {}
    if with_trainer:
        from transformers import Trainer, TrainingArguments

        from regrow.integrations.transformers import RePr

        def train(resume):
            callback, model = RePr(X[:1], **settings), resnet()
            arguments = TrainingArguments(
                f"{folder}/out", num_train_epochs=3, per_device_train_batch_size=3, use_cpu=True,
                report_to=[], disable_tqdm=True, dataloader_pin_memory=False, save_strategy="epoch",
                ddp_backend="gloo", lr_scheduler_type="constant",
            )  # fmt: skip
            pictures = [{"pixel_values": x, "labels": y} for x, y in zip(X, Y, strict=True)]
            Trainer(model, arguments, train_dataset=pictures, callbacks=[callback]).train(resume)
            return callback.events, model

        events, model = train(None)
        found["again"] = [event.kind for event in train(f"{folder}/out/checkpoint-2")[0]]
    else:
        from accelerate import Accelerator

        import regrow

        accelerator, plain = Accelerator(cpu=True), resnet()
        model, optimizer = accelerator.prepare(plain, torch.optim.SGD(plain.parameters(), lr=0.02))
        cycle = regrow.RePr(model, optimizer, example_inputs=X[:1], **settings)
        events = []
        for _ in range(3):
            part = slice(rank * 6, rank * 6 + 6)
            accelerator.backward(model(pixel_values=X[part], labels=Y[part]).loss)
            optimizer.step()
            optimizer.zero_grad()
            events.append(cycle.step())
        model, events = plain, [event for event in events if event]
    found |= {"events": [event.to_dict() for event in events], "model": model.state_dict()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    train_as_one_of_two(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
