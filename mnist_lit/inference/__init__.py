"""What a trained model is used for: predict, export, demo."""
