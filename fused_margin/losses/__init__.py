"""The loss modules."""
