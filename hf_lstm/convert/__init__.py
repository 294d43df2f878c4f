"""Conversion to other formats, one module per format."""
