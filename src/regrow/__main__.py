"""``python -m regrow`` and the installed command ``regrow``."""

import importlib.util
import sys


def main() -> None:
    """Run the command line, or say what to install if the study extra is missing."""
    needed = ("typer", "rich", "pydantic", "yaml")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        sys.exit(f"regrow: the command needs {', '.join(missing)}: pip install 'regrow[study]'")
    from regrow.cli import main as run

    run()


if __name__ == "__main__":
    main()
