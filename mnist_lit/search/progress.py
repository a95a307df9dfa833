"""One line that shows how far a search is."""

from typing import Any, Self

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """A bar where somebody watches, and else a line for each event.

    Args:
        total: Trials (or trainings) in all.
        unit: What is counted.
        num_done: How many were done before; they say nothing about how long the others take.
    """

    def __init__(self, total: int, unit: str, num_done: int = 0) -> None:
        self.bar: Any = tqdm(total=total, initial=num_done, unit=unit, disable=None, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def show(self, num_done: int, **facts: Any) -> None:
        """Show how many are done, and facts beside that."""
        if self.bar.disable:
            return
        self.bar.n = num_done
        self.bar.set_postfix_str(", ".join(f"{name.replace('_', ' ')} {fact}" for name, fact in facts.items()))

    def say(self, line: str) -> None:
        """A line for those who have no bar."""
        if self.bar.disable:
            print(line, flush=True)
