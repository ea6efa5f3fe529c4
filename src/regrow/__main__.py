"""``python -m regrow`` and the installed command ``regrow``."""

import importlib.util
import sys

from regrow import interrupts, terminal


def main() -> None:
    """Run the command line, or say what to install if the study extra is missing."""
    needed = ("typer", "rich", "pydantic", "yaml")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
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
