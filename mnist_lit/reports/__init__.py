"""Pages that tell of runs, and what all pages are made of."""
