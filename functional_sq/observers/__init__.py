"""The observers, one idea a file. A new one is a file here and a line in `functional_sq/__init__.py`."""
