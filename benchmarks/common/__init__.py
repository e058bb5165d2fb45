"""Code that several studies share: problems, contestants, timing, memory, and files of results."""
