"""`python -m mnist_lit COMMAND [--config FILE]... [--key VALUE]...`."""

from mnist_lit import main

if __name__ == "__main__":
    main()
