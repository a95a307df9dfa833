"""A page in the browser on which a digit is drawn or a photograph dropped, and the model reads it."""

import base64
import contextlib
import errno
import io
import socket
from pathlib import Path

import torch
from PIL import Image

from mnist_lit.data.datamodule import preprocess
from mnist_lit.data.digits import digit_in
from mnist_lit.errors import Stopped, UsageError
from mnist_lit.model.convnet import ConvNet

try:
    import gradio
    import uvicorn
    from fastapi import FastAPI
except ModuleNotFoundError as error:
    raise UsageError(f"the demo needs the package {error.name}\npip install 'mnist_lit[demo]'") from error

__all__ = ["page", "serve"]

TITLE = "Which digit is it?"
EXPLANATION = "Draw a digit, or drop a photograph of one anywhere on this page: the network reads it at once."
NO_DIGIT = "no digit"
PREFIX = "data:image/png;base64,"
# Gradio's own surface cannot be drawn on before a tool is chosen, again after each clearing, and needs WebGL; its own
# image component answers a file that is no image with a traceback.
SHEET = """
<canvas role="img" aria-label="paper to draw a digit on"></canvas>
<output></output>
<div><button class="photograph">Photograph …</button> <button class="clear">Clear</button></div>
<input type="file" accept="image/*" hidden>
"""
SHEET_STYLE = """
display: grid; gap: var(--spacing-lg); justify-items: center; text-align: center;
canvas { max-width: min(100%, 26rem); max-height: 26rem; touch-action: none; cursor: crosshair;
    border: 1px solid var(--border-color-primary); border-radius: var(--radius-lg); }
button { font-size: var(--text-md); padding: var(--spacing-md) var(--spacing-xxl); border-radius: var(--radius-lg);
    color: var(--button-secondary-text-color); background: var(--button-secondary-background-fill); }
output:empty { display: none; }
"""
SEEN = '${value ? `<img src="${value}" alt="28 by 28 pixels">` : ""}'
SEEN_STYLE = "img { width: 14rem; margin: var(--size-5) auto 0; image-rendering: pixelated; }"


def serve(model: ConvNet, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM ends it.

    Args:
        model: The model.
        host: Address to listen at.
        port: Port to listen at, 1 to 65535.

    Raises:
        UsageError: If the address cannot be had.
    """
    with contextlib.suppress(Stopped), _listener(host, port) as listener:
        # Fonts of the system: nothing is fetched from elsewhere.
        theme = gradio.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"])
        site = FastAPI(openapi_url=None)
        app = gradio.mount_gradio_app(site, page(model), "/", footer_links=[], run_history=False, theme=theme)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        print(f"demo: http://{host}:{port} (Ctrl-C ends it)", flush=True)
        server.run(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} of {host} is taken\ngive another --port") from error
        reason = str(error.strerror).partition(" (")[0]
        raise UsageError(f"{host}:{port}: {reason}\ngive another --host or --port") from error


def page(model: ConvNet) -> gradio.Blocks:
    """The page, for the server of Gradio's that shows it.

    Args:
        model: The model; it is set to evaluate.
    """
    model.eval()
    blocks = gradio.Blocks(title=TITLE, analytics_enabled=False)
    with blocks:
        gradio.Markdown(f"# {TITLE}\n{EXPLANATION}")
        with gradio.Row():
            with gradio.Column():
                script = Path(__file__).with_name("sketchpad.js").read_text(encoding="utf-8")
                sheet = gradio.HTML(html_template=SHEET, css_template=SHEET_STYLE, js_on_load=script)
            with gradio.Column():
                label = gradio.Label(NO_DIGIT, label="What the network reads", elem_id="reading")
                seen = gradio.HTML(
                    html_template=SEEN,
                    css_template=SEEN_STYLE,
                    label="What the network sees",
                    show_label=True,
                    container=True,
                    elem_id="seen",
                )
        sheet.input(
            lambda url: _read(model, url),
            sheet,
            [label, seen],
            queue=False,
            show_progress="hidden",
            trigger_mode="always_last",
            api_name="read",
        )
    return blocks


def _read(model: ConvNet, url: str) -> tuple[str | dict[str, float], str]:
    """What the label shows for an image, and what the network saw of it."""
    try:
        digit = digit_in(Image.open(io.BytesIO(base64.b64decode(str(url).removeprefix(PREFIX)))))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise gradio.Error("it is no image", print_exception=False) from error
    if digit is None:
        return NO_DIGIT, ""
    images = preprocess(torch.from_numpy(digit)[None, None], model.hparams["image_size"])
    with torch.inference_mode():
        probabilities = model(images).float().softmax(dim=1)[0].tolist()
    png = io.BytesIO()
    Image.fromarray(digit).save(png, "PNG")
    return (
        {str(label): probability for label, probability in enumerate(probabilities)},
        PREFIX + base64.b64encode(png.getvalue()).decode(),
    )
