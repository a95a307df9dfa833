"""Serve a page on which a person draws or drops an image, and sees the prediction."""

import base64
import contextlib
import functools
import io
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mnist_lit.data.datamodule import MNISTDataModule, preprocess
from mnist_lit.data.digits import choose
from mnist_lit.errors import Stopped, UsageError
from mnist_lit.model.classifier import Classifier

try:
    import gradio
    import uvicorn
    from fastapi import FastAPI
except ModuleNotFoundError as error:
    raise UsageError(f"the demo needs the package {error.name}\npip install 'mnist_lit[demo]'") from error


TITLE = "Which class is it?"
EXPLANATION = "Draw, or drop an image anywhere on this page: the network predicts its class at once."
NOTHING = "nothing found"
PREFIX = "data:image/png;base64,"
INPUT = '${value ? `<img src="${value}" alt="pixels">` : ""}'
INPUT_STYLE = "img { width: 14rem; margin: var(--size-5) auto 0; image-rendering: pixelated; }"


def serve(model: Classifier, datamodule: MNISTDataModule, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM ends it."""
    model.eval()
    try:
        listener = socket.create_server((host, port))
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]
        raise UsageError(f"{host}:{port}: {reason}\ngive another --host or --port") from error
    with contextlib.suppress(Stopped), listener:
        # Fonts of the system: nothing is fetched from elsewhere.
        theme = gradio.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
        page = _build_page(functools.partial(_predict, model, datamodule))
        site = FastAPI(openapi_url=None)
        app = gradio.mount_gradio_app(site, page, "/", footer_links=[], run_history=False, theme=theme)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        print(f"demo: http://{host}:{port} (Ctrl-C ends it)", flush=True)
        server.run(sockets=[listener])


def _build_page(predict: Callable[[str], object]) -> gradio.Blocks:
    # Gradio's own sketchpad needs WebGL, and a choice of the tool after each clearing; its image component answers a
    # file that is not an image with a traceback.
    files = (Path(__file__).with_name(f"sketchpad.{kind}") for kind in ("html", "css", "js"))
    html, css, script = (file.read_text(encoding="utf-8") for file in files)
    blocks = gradio.Blocks(title=TITLE, analytics_enabled=False)
    with blocks:
        gradio.Markdown(f"# {TITLE}\n{EXPLANATION}")
        with gradio.Row():
            with gradio.Column():
                sketchpad = gradio.HTML(html_template=html, css_template=css, js_on_load=script)
            with gradio.Column():
                label = gradio.Label(NOTHING, label="Prediction", elem_id="prediction")
                network_input = gradio.HTML(
                    html_template=INPUT,
                    css_template=INPUT_STYLE,
                    label="Input of the network",
                    show_label=True,
                    container=True,
                    elem_id="network-input",
                )
        outputs: list[Any] = [label, network_input]
        quiet: dict[str, Any] = {"queue": False, "show_progress": "hidden", "trigger_mode": "always_last"}
        sketchpad.input(predict, sketchpad, outputs, api_name="predict", **quiet)
    return blocks


def _predict(model: Classifier, datamodule: MNISTDataModule, url: str) -> tuple[str | dict[str, float], str]:
    """Compute the prediction for an image, and the network's input as a data URL."""
    try:
        candidates = datamodule.convert(Image.open(io.BytesIO(base64.b64decode(str(url).removeprefix(PREFIX)))))
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise gradio.Error("this is not an image", print_exception=False) from error
    if not candidates:
        return NOTHING, ""
    digits = [torch.from_numpy(found.digit).view(-1, *found.digit.shape[-2:]) for found in candidates]
    images = preprocess(torch.stack(digits), datamodule.image_size)
    with torch.inference_mode():
        probabilities = model(images).float().softmax(dim=1)
    index, _ = choose(candidates, probabilities.amax(dim=1).tolist())
    png = io.BytesIO()
    pixels = candidates[index].digit
    Image.fromarray(pixels if pixels.ndim == 2 else pixels.transpose(1, 2, 0)).save(png, "PNG")
    labels = dict(zip(datamodule.class_names, probabilities[index].tolist(), strict=True))
    return labels, PREFIX + base64.b64encode(png.getvalue()).decode()
