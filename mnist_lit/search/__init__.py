"""The search: Optuna proposes overrides of `fit`'s configuration, workers train them."""
