"""Data sets, the data module, augmentation, image files."""
