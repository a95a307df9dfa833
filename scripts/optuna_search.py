"""Search for the best configuration: `python scripts/optuna_search.py --config configs/search.yaml --n_trials 20`."""

from mnist_lit.search.command import main

if __name__ == "__main__":
    main()
