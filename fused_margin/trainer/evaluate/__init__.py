"""Evaluation of a trained network, or of features from files, with report and figures."""
