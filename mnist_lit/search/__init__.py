"""The search: Optuna proposes trials, workers train them through the one door, a study remembers them."""
