"""Messages of the library in the words of the command."""

import warnings

import pytest

from regrow import cli
from regrow.pruning.budget import check_target
from regrow.pruning.choosing import check_choice
from regrow.pruning.shares import check_shares
from regrow.study.flags import in_flags


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("write fraction=0.5.", "write --fraction 0.5."),
        ("than fraction= asks for", "than --fraction asks for"),
        ("fraction=, max_drop=, macs= and latency=", "--fraction, --max-drop, --macs and --latency"),
        ('write fraction={"layer3": 0.6, "a.b": 0.2}.', "write --fraction layer3=0.6,a.b=0.2."),
        ("(round_to=1 prevents that)", "(--round-to 1 prevents that)"),
        ("floor=0.1, round_to=8 or coupled='jointly'.", "--floor 0.1, --round-to 8 or --coupled jointly."),
        ("write compensate=False.", "write --no-compensate."),
        ("runs/fraction=0.5/one is gone", "runs/fraction=0.5/one is gone"),
        ("macs=0.5/one is not a run folder", "macs=0.5/one is not a run folder"),
        ("macs=0.5.old is not a run folder", "macs=0.5.old is not a run folder"),
        ("label_floor=0.5 and a=b", "label_floor=0.5 and a=b"),
    ],
)  # fmt: skip
def test_a_message(message: str, shown: str) -> None:
    assert in_flags(message) == shown


@pytest.mark.parametrize(
    "refused",
    [
        lambda: check_target({}),
        lambda: check_target({"max_drop": 100}),
        lambda: check_target({"macs": 2}),
        lambda: check_target({"fraction": 2}),
        lambda: check_target({"macs": {"a": 0.5}}),
        lambda: check_shares({"a": 0.5}, "global"),
        lambda: check_shares({}, "layer"),
        lambda: check_choice("layer", 2, None, "jointly"),
        lambda: check_choice("layer", 0.1, 0, "jointly"),
    ],
)
def test_what_the_command_shows_has_no_arguments_of_functions(
    refused: object, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main sets another
    monkeypatch.setattr(cli, "app", lambda **_: refused())  # type: ignore[operator]
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().err
    assert shown.startswith("regrow: ")
    assert "=" not in shown.replace("<=", "").replace("layer3=0.6", ""), shown
