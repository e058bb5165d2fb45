"""The HTML pages of reports: one self-contained file each, rendered from the templates of this package."""
