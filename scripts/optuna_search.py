"""Search for the best configuration: `python scripts/optuna_search.py --config configs/search.yaml --n_trials 20`."""

import sys

from mnist_lit import main

if __name__ == "__main__":
    main(["search", *sys.argv[1:]])
