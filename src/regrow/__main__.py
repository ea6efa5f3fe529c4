"""``python -m regrow`` and the installed command ``regrow``."""

import importlib.util
import sys


def main() -> None:
    """Hand over to the command line, or say what to install where the study extra is missing."""
    missing = [
        name for name in ("typer", "rich", "pydantic", "yaml") if importlib.util.find_spec(name) is None
    ]
    if missing:
        sys.exit(f"regrow: the command needs {', '.join(missing)}: pip install 'regrow[study]'")
    from regrow.cli import main as run

    run()


if __name__ == "__main__":
    main()
