"""Identification of images or features in a gallery of known identities."""
