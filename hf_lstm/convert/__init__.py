"""Models in other formats: one file for each."""
