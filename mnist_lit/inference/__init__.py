"""Uses of a trained model: predict, export, demo."""
