"""Arguments of the commands beside trainer, model, data and callbacks."""

from typing import Any

from jsonargparse.typing import restricted_number_type

__all__ = ["arguments_of"]

# Annotated Any, as mypy takes no type that a function makes; without a name jsonargparse makes one of the range.
Threads: Any = restricted_number_type(None, int, [(">=", 1), ("<=", 1024)])
Port: Any = restricted_number_type(None, int, [(">=", 1), ("<=", 65535)])
# Type, default and help of the arguments beside trainer, model, data and callbacks.
ARGUMENTS: dict[str, tuple[Any, Any, str]] = {
    "ckpt_path": (str | None, None, "Checkpoint: a run directory, a file or a URL."),
    "run_dir": (str | None, None, "Folder of the run; default the next free logs/run_N."),
    "test_after_fit": (bool, False, "Whether fit ends with a test of the best checkpoint."),
    "csv": (bool, False, "Whether the scalars are also written to RUN/metrics.csv."),
    "report": (bool, True, "Whether the run is also shown on a page, RUN/report.html."),
    "num_threads": (
        Threads | None,
        None,
        "Threads of torch on the CPU, 1 to 1024; default one for each core. The last bits depend on it.",
    ),
}
ENSEMBLE: tuple[Any, Any, str] = (
    list[str],
    [],
    "More checkpoints (file, URL, run directory), whose probabilities are averaged with ckpt_path's.",
)
COMMAND_ARGUMENTS: dict[str, dict[str, tuple[Any, Any, str]]] = {
    "fit": {},
    "export": {
        "ensemble": ENSEMBLE,
        "output": (
            str,
            "model.onnx",
            "File to write, from uint8 images to probabilities: `.onnx` or `.pt2`.",
        ),
    },
    "demo": {
        "ensemble": ENSEMBLE,
        "host": (str, "127.0.0.1", "Address to listen at; the default can be reached from this machine only."),
        "port": (Port, 7860, "Port to listen at, 1 to 65535."),
    },
}


def arguments_of(command: str) -> dict[str, tuple[Any, Any, str]]:
    """Return type, default and help of each argument of a command."""
    return ARGUMENTS | COMMAND_ARGUMENTS.get(command, {"ensemble": ENSEMBLE})
