"""On a real Ray cluster of one node, started once."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from regrow.study import cluster, records
from regrow.study.cluster import ray_cluster
from regrow.study.config import make_config
from regrow.study.plan import Job
from regrow.study.watching import log_path

SMALL = {"width": 4, "train_size": 200, "epochs": 3, "threads": 1, "method": "standard"}


@pytest.fixture(scope="module")
def cluster_process() -> Iterator[tuple[str, int]]:
    """The address of a cluster of two CPUs that these tests share, and the process that started it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("RAY_AUTH_MODE", "token")
    patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    code = (
        "import ray; ray.init('local', num_cpus=2, include_dashboard=False, object_store_memory=2**27);"
        "print(ray.get_runtime_context().gcs_address, flush=True); input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process.stdout.readline().strip(), process.pid
    finally:
        patch.undo()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate("\n", timeout=20)
        process.kill()


@pytest.fixture
def address(cluster_process: tuple[str, int]) -> str:
    return cluster_process[0]


class Noted:
    """A watch that notes what it is told."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str, str | None]] = []
        self.on_tick = lambda: None

    def started(self, job: Job) -> None:
        self.said.append(("started", job.folder.parent.name, None))

    def finished(self, job: Job, error: str | None) -> None:
        self.said.append(("finished", job.folder.parent.name, error))

    def tick(self) -> None:
        self.on_tick()


def job(folder: Path, **settings: object) -> Job:
    return Job(make_config({**SMALL, **settings}), folder, "new")


def test_runs_on_a_cluster_a_failed_one_and_one_whose_worker_is_killed(
    cluster_process: tuple[str, int], tmp_path: Path
) -> None:
    address, below = cluster_process
    long, bad, good = jobs = [
        job(tmp_path / "a" / "standard-seed0", epochs=150),
        job(tmp_path / "b" / "standard-seed0", model="vgg", depth=12),
        job(tmp_path / "c" / "standard-seed0"),
    ]
    watch, killed = Noted(), []

    def kill() -> None:
        if not killed and len(records.read_lines(records.epochs_path(long.folder))) > 3:
            (worker,) = (pid for pid in _workers(below) if _has_open(pid, long.folder))
            os.kill(worker, signal.SIGKILL)
            killed.append(worker)

    watch.on_tick = kill
    with ray_cluster(address) as train:
        failed = train(jobs, watch)
    assert list(failed) == [bad.folder]
    assert "12" in failed[bad.folder]
    assert "12" in (tmp_path / "b" / "logs" / "standard-seed0.log").read_text()
    assert sorted((kind, name) for kind, name, _ in watch.said) == [
        (kind, folder) for kind in ("finished", "started") for folder in "abc"
    ]
    assert killed
    assert [epoch["epoch"] for epoch in records.read_run(long.folder).epochs] == list(range(1, 151))
    assert records.read_run(long.folder).environment["resumed"] == 1, "from its checkpoint"
    command = records.read_run(good.folder).environment["command"]
    assert "default_worker" not in command, "the command is what a person typed"
    assert not list((tmp_path / "c" / "logs").iterdir())


class TwoNodes:
    """Of Ray what ``_misfit`` and ``_unseen`` use: two nodes, and only the first sees the folder."""

    def nodes(self) -> list[dict]:
        return [
            {"NodeID": "a" * 56, "NodeManagerHostname": "first", "Alive": True, "Resources": {"CPU": 4.0}},
            {
                "NodeID": "b" * 56,
                "NodeManagerHostname": "second",
                "Alive": True,
                "Resources": {"CPU": 2.0, "GPU": 1},
            },
            {"NodeID": "c" * 56, "NodeManagerHostname": "dead", "Alive": False, "Resources": {"CPU": 99.0}},
        ]

    def remote(self, **_: object) -> object:
        return lambda look: Sent(look)

    def get(self, answer: bool, timeout: float) -> bool:
        assert timeout
        return answer


class Sent:
    def __init__(self, look: Callable[[str], bool], sees: bool = True) -> None:
        self.look, self.sees = look, sees

    def options(self, scheduling_strategy: object) -> "Sent":
        return Sent(self.look, scheduling_strategy.node_id == "a" * 56)

    def remote(self, marker: str) -> bool:
        return self.look(marker if self.sees else marker + "-elsewhere")


def test_a_node_that_does_not_see_the_folder(tmp_path: Path) -> None:
    error = cluster._unseen(TwoNodes(), tmp_path)
    assert error.startswith(f"second of the Ray cluster does not see {tmp_path}")
    assert not list(tmp_path.iterdir()), "the marker is removed"


@pytest.mark.parametrize(("cpus", "gpus", "fits"), [(4, 0, True), (2, 1, True), (4, 1, False), (5, 0, False)])
def test_what_no_node_has_is_refused(cpus: int, gpus: float, fits: bool) -> None:
    error = cluster._misfit(TwoNodes(), cpus, gpus)
    assert (error is None) == fits
    if error:
        assert error.endswith("have 4 CPUs and 0 GPUs, 2 CPUs and 1 GPUs.")


def test_what_no_node_has_is_refused_by_a_real_cluster(address: str) -> None:
    message = "3 CPUs and 0 GPUs, but the nodes of the cluster have 2 CPUs"
    with pytest.raises(ValueError, match=message), ray_cluster(address, cpus=3):
        raise AssertionError


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_that_does_not_answer_is_an_error_and_no_hang(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_CONNECT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        message = f"no Ray cluster answers at {address} .* within 1 seconds"
        with pytest.raises(ValueError, match=message), ray_cluster(address):
            raise AssertionError


def listening(process: int) -> dict[str, str]:
    """{inode of a socket on which ``process`` or one of its children listens: its address in hexadecimal}."""
    family = [process]
    for each in family:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{each}/task").iterdir():
                family += map(int, (task / "children").read_text().split())
    tables = [Path(f"/proc/net/{name}").read_text().splitlines() for name in ("tcp", "tcp6")]
    lines = [line.split() for table in tables for line in table]
    addresses = {f"socket:[{line[9]}]": line[1].rpartition(":")[0] for line in lines if line[3] == "0A"}
    found = {}
    for each in family:
        for link in Path(f"/proc/{each}/fd").glob("*"):
            with contextlib.suppress(OSError):
                name = os.readlink(link)
                found.update({name: addresses[name]} if name in addresses else {})
    return found


def test_a_cluster_that_is_started_here_listens_on_the_loopback_address_only() -> None:
    before = listening(os.getpid())
    with ray_cluster():
        found = [at for socket, at in listening(os.getpid()).items() if socket not in before]
    assert len(found) > 2
    assert {address[-8:] for address in found} == {"0100007F"}


def test_what_is_no_address() -> None:
    with pytest.raises(ValueError, match="Ray cannot be used at nonsense"), ray_cluster("nonsense"):
        raise AssertionError


def test_ray_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"pip install 'regrow\[ray\]'"), ray_cluster():
        raise AssertionError


@pytest.mark.parametrize(("cpus", "gpus"), [(0, 0), (1, -1)])
def test_resources_that_are_none(cpus: int, gpus: float) -> None:
    with pytest.raises(ValueError, match="1 CPU or more"), ray_cluster(cpus=cpus, gpus=gpus):
        raise AssertionError


def test_the_token_of_this_machine_is_shown_to_this_machine_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    assert cluster._token_settings("127.0.0.1:6379") == {}, "there is none"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    for address in ("127.0.0.1:6379", "localhost:6379", "ray://127.0.0.1:10001"):
        assert cluster._token_settings(address) == {"RAY_AUTH_MODE": "token"}
    for address in ("192.0.2.77:6379", "ray://203.0.113.9:10001", "auto"):
        assert cluster._token_settings(address) == {}
    one, two = cluster._token_settings(None), cluster._token_settings(None)
    assert one["RAY_AUTH_TOKEN"] != two["RAY_AUTH_TOKEN"]


def _workers(of: int) -> list[int]:
    """The processes below ``of`` that Ray has a run in: it titles them so."""
    parents, titles = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(path.name)] = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            titles[int(path.name)] = (path / "cmdline").read_text()
    found = []
    for pid, title in titles.items():
        above = pid
        while above in parents and above != of:
            above = parents[above]
        if above == of and title.startswith("ray::_remote"):
            found.append(pid)
    return found


def _has_open(pid: int, folder: Path) -> bool:
    """Whether the process writes to the log of the run in ``folder``."""
    log = str(log_path(folder))
    return any(os.readlink(link) == log for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
