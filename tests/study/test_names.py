import subprocess
import sys

from regrow.study import families
from regrow.study.names import MODEL_FAMILIES


def test_names_need_no_torch() -> None:
    code = "import sys, regrow.study.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_family_has_its_function() -> None:
    assert all(callable(getattr(families, name)) for name in MODEL_FAMILIES)
