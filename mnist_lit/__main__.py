"""`python -m mnist_lit COMMAND [--config FILE]... [--key VALUE]...`."""

from mnist_lit import main


def command() -> None:
    """Run the command line of this process; an installed command exits with what this returns."""
    main()


if __name__ == "__main__":
    command()
