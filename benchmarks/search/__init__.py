"""Exact search of galleries beside FAISS."""
