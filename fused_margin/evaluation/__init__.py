"""Face-recognition evaluation on arrays: protocols, metrics, and readers of published pair lists and feature files.

Takes features from any model, as NumPy arrays, and needs scikit-learn but not the trainer.
"""

from .errors import DataError
from .features import Features, FeatureSet, MegafaceSet, read_arrays, read_features, read_megaface
from .folds import stratified_folds, unshuffled_folds
from .megaface import MegafaceResult, megaface
from .metrics import (
    FoldAccuracy,
    RocCurve,
    ScoreSummary,
    TarAtFar,
    equal_error_rate,
    kfold_accuracy,
    roc,
    summarize,
    summarize_pairs,
    tar_at_far,
)
from .pair_lists import VerificationSet, find_pair_list, read_bin, read_lfw, read_ytf
from .pairs import Pairs, make_pairs
from .protocols import FoldTar, PairResult, cosine_pairs, join_mirror, lfw, weighted_l1_pairs, ytf
from .weighted_l1 import WeightedL1Head, fit_head

__all__ = [
    "DataError",
    "FeatureSet",
    "Features",
    "FoldAccuracy",
    "FoldTar",
    "MegafaceResult",
    "MegafaceSet",
    "PairResult",
    "Pairs",
    "RocCurve",
    "ScoreSummary",
    "TarAtFar",
    "VerificationSet",
    "WeightedL1Head",
    "cosine_pairs",
    "equal_error_rate",
    "find_pair_list",
    "fit_head",
    "join_mirror",
    "kfold_accuracy",
    "lfw",
    "make_pairs",
    "megaface",
    "read_arrays",
    "read_bin",
    "read_features",
    "read_lfw",
    "read_megaface",
    "read_ytf",
    "roc",
    "stratified_folds",
    "summarize",
    "summarize_pairs",
    "tar_at_far",
    "unshuffled_folds",
    "weighted_l1_pairs",
    "ytf",
]
