"""Pages from Jinja2 templates: each is one file that loads nothing from elsewhere."""

import statistics
from typing import Any

from jinja2 import Environment, PackageLoader

from mnist_lit.formatting import format_duration, format_score, format_value, shorten

__all__ = ["render"]


def render(template: str, **values: Any) -> str:
    """Fill in a template; every value is escaped.

    Args:
        template: Its path within the package, for example `reports/run_report.html.jinja`.
        values: What it shows, by name.
    """
    environment = Environment(
        loader=PackageLoader("mnist_lit", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"duration": format_duration, "score": format_score, "shorten": shorten}
    environment.filters |= {"value": format_value, "mean": statistics.mean, "stdev": statistics.stdev}
    return environment.get_template(template).render(values)
