"""The exact nearest-class search, and what is kept of it between steps."""
