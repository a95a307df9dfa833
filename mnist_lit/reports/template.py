"""Pages from Jinja2 templates: each is one file that loads nothing from elsewhere."""

import statistics
from typing import Any

from jinja2 import Environment, PackageLoader

from mnist_lit.formatting import format_duration, format_score, format_value, shorten


def render(template: str, **values: Any) -> str:
    """Fill in a template of the package, such as `reports/run_report.html.jinja`; every value is escaped."""
    loader = PackageLoader("mnist_lit", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": format_duration, "score": format_score, "shorten": shorten}
    environment.filters |= {"value": format_value, "mean": statistics.mean, "stdev": statistics.stdev}
    return environment.get_template(template).render(values)
