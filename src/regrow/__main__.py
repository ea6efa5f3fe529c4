"""``python -m regrow`` and the installed command ``regrow``."""

import importlib.util
import sys

from regrow import __version__, interrupts, terminal

# For an installation without the study extra. All else of the command's help is typer's.
HELP = f"""regrow {__version__}: better convolutional filters, and networks without those that are not needed.

The library is installed (import regrow). The command, with train, compare, study, curve, analyse, prune and
report, needs more: {{missing}}. This installs it:

    pip install 'regrow[study]'
"""


def main() -> None:
    """Run the command line, or say what to install if the study extra is missing."""
    needed = ("typer", "rich", "pydantic", "yaml")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        if sys.argv[1:] in ([], ["--help"], ["--version"]):
            print(HELP.format(missing=", ".join(missing)), end="")
            sys.exit(0)
        sys.exit(f"regrow: the command needs {', '.join(missing)}: pip install 'regrow[study]'")
    terminal.take_over()
    interrupts.take_over()
    try:
        from regrow.cli import main as run

        run()
    except SystemExit as ended:
        # What a library makes of the exception that a signal raises is not the command's status.
        status = interrupts.exit_status() or ended.code
        interrupts.leave()
        if (lost := terminal.lost_output()) and not status:
            print(f"regrow: standard output cannot be written: {lost}", file=sys.stderr)
            status = 1
        sys.exit(status)
    except KeyboardInterrupt:
        interrupts.leave()
        sys.exit(interrupts.exit_status())


if __name__ == "__main__":
    main()
