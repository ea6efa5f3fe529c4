"""The rounds of a run: an equal share of the epochs for each task and each generation of the method.

Imports no PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rounds:
    """A run of ``epochs`` epochs in ``tasks`` times ``generations`` rounds, which are numbered from 0.

    The learning rate, and RePr's cycles, begin anew in each round. The generations of a task follow each
    other.
    """

    epochs: int
    tasks: int = 1
    generations: int = 1

    @property
    def count(self) -> int:
        return self.tasks * self.generations

    @property
    def length(self) -> int:
        """Epochs of a round."""
        return max(1, self.epochs // self.count)

    def check(self) -> None:
        """Raise ``ValueError`` unless the rounds divide the epochs evenly."""
        if self.epochs % self.count:
            parts = [f"{self.tasks} tasks"] * (self.tasks > 1)
            parts += [f"{self.generations} generations"] * (self.generations > 1)
            nearest = max(1, round(self.epochs / self.count)) * self.count
            raise ValueError(
                f"epochs: {self.epochs} epochs cannot be divided evenly by {' × '.join(parts)}: train for "
                f"{nearest}, say."
            )

    def after(self, epoch: int) -> int:
        """The round that goes on when ``epoch`` epochs are trained; after the last epoch the last round."""
        return min(epoch // self.length, self.count - 1)

    def trained(self, epoch: int) -> int:
        """How many epochs of the round ``after(epoch)`` are among the first ``epoch`` epochs."""
        return epoch - self.after(epoch) * self.length

    def ends(self, epoch: int) -> bool:
        """Whether another round begins after epoch ``epoch``, counted from 1."""
        return epoch % self.length == 0 and epoch < self.epochs

    def ends_task(self, epoch: int) -> bool:
        """Whether another task begins after epoch ``epoch``, counted from 1."""
        return epoch % (self.length * self.generations) == 0 and epoch < self.epochs

    def task(self, number: int) -> int:
        """The task, from 0, of round ``number``."""
        return number // self.generations
