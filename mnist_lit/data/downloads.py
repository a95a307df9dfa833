"""Downloads: over HTTP and HTTPS only, never from the second to the first, and of a bounded size."""

from pathlib import Path
from typing import Any
from urllib import request
from urllib.error import HTTPError, URLError

from tqdm import tqdm

__all__ = ["download"]

CHUNK = 2**20  # bytes


def download(url: str, file: Path, *, timeout: float, max_bytes: int, title: str | None = None) -> None:
    """Write what an address answers to a file; what has come before an error is left in it.

    Args:
        url: An http or https address.
        file: The file to write.
        timeout: The longest wait for the server to connect or to send on, in seconds.
        max_bytes: The largest answer that is taken.
        title: Name of the progress bar; None for no bar.

    Raises:
        OSError: If it cannot be reached, has no such thing, or redirects to what is not allowed.
        HTTPException: If it does not speak HTTP.
        ValueError: If it is no address, or the answer is too large.
    """
    with (
        _answer(url, timeout) as response,
        tqdm.wrapattr(response, "read", total=response.length, desc=title, disable=title is None) as source,
        file.open("wb") as target,
    ):
        while chunk := source.read(CHUNK):
            if target.tell() + len(chunk) > max_bytes:
                raise ValueError(f"more than {max_bytes:,} bytes")
            target.write(chunk)


def _answer(url: str, timeout: float) -> Any:
    try:
        return _http_opener().open(url, timeout=timeout)
    except HTTPError as error:
        error.close()
        raise


class Redirects(request.HTTPRedirectHandler):
    """Follows redirects, but not from an encrypted address to one that is not."""

    def redirect_request(self, req: request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if req.type == "https" and not newurl.lower().startswith("https://"):
            fp.close()
            raise URLError(f"redirected to {newurl}, which is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _http_opener() -> request.OpenerDirector:
    """Opens http and https addresses only: urllib's own opener also opens `file:`, and follows redirects to `ftp:`."""
    proxies = {scheme: url for scheme, url in request.getproxies().items() if scheme in {"http", "https"}}
    protocols = (request.ProxyHandler(proxies), request.HTTPHandler(), request.HTTPSHandler(), request.UnknownHandler())
    answers = (Redirects(), request.HTTPErrorProcessor(), request.HTTPDefaultErrorHandler())
    opener = request.OpenerDirector()
    for handler in (*protocols, *answers):
        opener.add_handler(handler)
    return opener
