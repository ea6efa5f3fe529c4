"""RePr in your own loop: train a small net on scikit-learn's digits, and stop and resume it on the way."""

import io

import torch
from sklearn.datasets import load_digits
from torch import nn

import regrow

EPOCHS = 30


def make() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, regrow.RePr]:
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    # Three cycles of 4 + 2 epochs at the full rate; the 12 epochs after the last restore anneal it.
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(1.0, (EPOCHS - epoch) / 12))
    cycle = regrow.RePr(
        model, optimizer, fraction=0.3, full=4, sub=2, cycles=3, example_inputs=torch.zeros(1, 1, 8, 8)
    )
    return model, optimizer, scheduler, cycle


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    training, test = slice(0, 1400), slice(1400, None)

    parts = model, optimizer, scheduler, cycle = make()
    for epoch in range(1, EPOCHS + 1):
        model.train()
        for chosen in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[training][chosen]), labels[training][chosen]).backward()
            optimizer.step()
        scheduler.step()
        if event := cycle.step():
            print(f"epoch {epoch}: {event.kind}", {name: len(found) for name, found in event.filters.items()})
        if epoch == 5:  # filters are off now: save everything, build everything anew, continue
            file = io.BytesIO()
            torch.save([part.state_dict() for part in parts], file)
            file.seek(0)
            parts = model, optimizer, scheduler, cycle = make()
            for part, state in zip(parts, torch.load(file, weights_only=True), strict=True):
                part.load_state_dict(state)
    cycle.remove()

    model.eval()
    with torch.inference_mode():
        accuracy = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
    print(f"test accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
