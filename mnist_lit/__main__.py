"""`python -m mnist_lit {fit,validate,test,predict} [--config FILE]... [--key VALUE]...`."""

from mnist_lit import main

if __name__ == "__main__":
    main()
