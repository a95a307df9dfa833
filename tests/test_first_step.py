"""The way from the command line to the first optimizer step is short."""

import json
import subprocess
import sys
from pathlib import Path

from conftest import CONFIGS

MAX_FILES, MAX_FUNCTIONS = 20, 114  # more is a step back
SCRIPT = """
import json, sys, threading
from pathlib import Path
import mnist_lit
package = str(Path(mnist_lit.__file__).parent)
functions = set()
def note(frame, event, _):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(package) and not code.co_qualname.endswith(">"):
        if code.co_flags & 1:  # optimized: a function, no body of a class or module
            functions.add((code.co_filename.removeprefix(package), code.co_qualname))
    if event == "call" and code.co_name == "optimizer_step" and "lightning" in code.co_filename:
        sys.setprofile(None)
        print("FIRST STEP", json.dumps(sorted(functions)), flush=True)
        raise SystemExit(0)
sys.setprofile(note)
mnist_lit.main(sys.argv[1:])
"""


def test_first_step_is_near(tmp_path: Path) -> None:
    args = ["fit", f"--config={CONFIGS / 'base.yaml'}", f"--config={CONFIGS / 'digits.yaml'}", "--run_dir=run"]
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, *args], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    line = next((line for line in run.stdout.splitlines() if line.startswith("FIRST STEP")), "")
    assert line, run.stderr
    functions = [tuple(function) for function in json.loads(line.removeprefix("FIRST STEP"))]
    files = {file for file, _ in functions}

    assert len(files) <= MAX_FILES, sorted(files)
    assert len(functions) <= MAX_FUNCTIONS, (len(functions), functions)
