"""Training objectives beside each other."""
