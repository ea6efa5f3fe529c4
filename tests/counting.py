"""The operations that PyTorch runs: on a GPU each of them is a launch."""

from torch.utils._python_dispatch import TorchDispatchMode


class Counted(TorchDispatchMode):
    """The names of the operations that run, without views and memory that is not written to."""

    _LEFT_OUT = (
        "view",
        "as_strided",
        "detach",
        "empty",
        "slice",
        "transpose",
        "alias",
        "expand",
        "set_",
        ".t.",
        "lift",
    )

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not any(part in str(operation) for part in self._LEFT_OUT):
            self.names.append(str(operation).removeprefix("aten."))
        return operation(*args, **(kwargs or {}))
