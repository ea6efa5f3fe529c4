"""timm's training parts with RePr and Bridgeout: train, stop in a sub phase, resume, and cut the result.

What is marked with "regrow" is what to insert in timm's own train.py (docs/timm.md).

Usage: python timm_training.py [--epochs 9] [--stop-after EPOCH] [--resume output/last.pth.tar] [--out output]
"""

import argparse
import itertools
from pathlib import Path

import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm import create_model
from timm.data import Mixup, create_dataset, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler, random_seed
from torch import nn

import regrow

SIZE = 32


def write_pictures(folder: Path, count: int) -> None:
    """The first digits of scikit-learn as folders of pictures, one for each class."""
    digits = load_digits()
    for part, numbers in (("train", range(count)), ("validation", range(1400, 1600))):
        for number in numbers:
            place = folder / part / str(digits.target[number])
            place.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray((digits.images[number] * 15.9).astype("uint8")).convert("RGB")
            picture.save(place / f"{number}.png")


class Saver(CheckpointSaver):
    """timm's saver, which writes the states of RePr and Bridgeout beside those of model and optimizer."""

    cycle: regrow.RePr

    def state_dict(self, *arguments, **keywords):
        states = {"cycle": self.cycle.state_dict(), "noise": regrow.bridgeout_state(self.model)}
        return {**super().state_dict(*arguments, **keywords), "regrow": states}


@torch.inference_mode()
def accuracy(model: nn.Module, loader) -> float:
    model.eval()
    right = [(model(images).argmax(1) == labels).float() for images, labels in loader]
    return torch.cat(right).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=9)
    parser.add_argument("--train-size", type=int, default=512)
    parser.add_argument("--stop-after", type=int)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--out", type=Path, default=Path("output"))
    args = parser.parse_args()
    data = args.out / "digits"
    if not data.exists():
        write_pictures(data, args.train_size)
    shape = {"input_size": (3, SIZE, SIZE), "batch_size": 64, "use_prefetcher": False, "num_workers": 0}
    training = create_loader(
        create_dataset("", str(data), split="train"), is_training=True, hflip=0, scale=(0.8, 1.0), **shape
    )
    validation = create_loader(create_dataset("", str(data), split="validation"), is_training=False, **shape)
    mixup = Mixup(mixup_alpha=0.1, label_smoothing=0.05, num_classes=10)
    loss_of = SoftTargetCrossEntropy()

    random_seed(0)
    model = create_model("test_resnet", num_classes=10).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=5e-4, momentum=0.9)
    scaler = NativeScaler(device="cpu")
    ema = ModelEmaV3(model, decay=0.9)
    regrow.add_bridgeout(model, p=0.02, exclude=["conv1"])  # regrow: after ModelEmaV3, which copies the model
    pictures = torch.zeros(2, 3, SIZE, SIZE)  # two: the last maps have one pixel, and norms need more
    cycle = regrow.RePr(model, optimizer, example_inputs=pictures, full=2, sub=1, cycles=2)  # regrow
    cycle.follow(ema)  # regrow
    saver = Saver(model, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=str(args.out))
    saver.cycle = cycle  # regrow

    first = 0
    if args.resume:
        first = resume_checkpoint(model, str(args.resume), optimizer, scaler, log_info=False)
        state = torch.load(args.resume, weights_only=True)
        ema.module.load_state_dict(state["state_dict_ema"])
        cycle.load_state_dict(state["saver"]["regrow"]["cycle"])  # regrow: after model, optimizer and EMA
        regrow.load_bridgeout_state(model, state["saver"]["regrow"]["noise"])  # regrow
    # A step in each epoch, at a rate that falls after the last restore.
    scheduler, _ = create_scheduler_v2(
        optimizer, "multistep", num_epochs=args.epochs, decay_milestones=[7, 8], decay_rate=0.3,
        warmup_epochs=0, step_on_epochs=False, updates_per_epoch=len(training),
    )  # fmt: skip
    scheduler.step_update(first * len(training))

    for epoch in range(first, args.epochs):
        random_seed(epoch)  # so that a resumed run draws the same batches
        model.train()
        for done, (images, labels) in enumerate(training, start=epoch * len(training) + 1):
            images, targets = mixup(images.contiguous(memory_format=torch.channels_last), labels)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model(images), targets)
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            optimizer.zero_grad()
            ema.update(model, step=done)
            scheduler.step_update(done)
        if event := cycle.step():  # regrow: at the end of an epoch, ahead of validation and the checkpoint
            print(
                f"epoch {epoch + 1}: {event.kind}", {name: len(each) for name, each in event.filters.items()}
            )
        saver.save_checkpoint(epoch, metric=accuracy(ema.module, validation))
        if epoch + 1 == args.stop_after:
            return
    cycle.remove()  # regrow
    regrow.remove_bridgeout(model)  # regrow
    print(f"accuracy {accuracy(ema.module, validation):.1%} with averaged weights")

    calibration = [images for images, _ in itertools.islice(training, 8)]
    report = regrow.prune(ema.module, macs=0.5, example_inputs=pictures, calibration=calibration)
    left = report["macs"]["after"] / report["macs"]["before"]
    print(f"accuracy {accuracy(ema.module, validation):.1%} with {left:.0%} of the arithmetic")
    regrow.save(ema.module, args.out / "small.safetensors")


if __name__ == "__main__":
    main()
