"""Face-recognition evaluation on arrays: protocols, metrics, and readers of published pair lists and feature files.

Takes features from any model, as NumPy arrays, and needs scikit-learn but not the trainer.
"""

from .errors import DataError
from .features import Features, FeatureSet, MegafaceSet, read_arrays, read_features, read_megaface
from .folds import stratified_folds, unshuffled_folds
from .gallery import Gallery, enroll
from .gallery_search import Ranking, Recognition, recognize, search_gallery
from .gallery_split import GallerySplit, split_gallery
from .gallery_threshold import estimate_threshold
from .identification import DirAtFar, IdentificationResult, OperatingCurve, ThresholdAtFpir, identification
from .identification_by_verification import VerifiedIdentities, identify_by_verification
from .megaface import MegafaceResult, megaface
from .megaface_lists import (
    MegafaceGallery,
    MegafaceGalleryResults,
    MegafaceLists,
    megaface_galleries,
    read_listed_features,
    read_megaface_lists,
)
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
    "DirAtFar",
    "FeatureSet",
    "Features",
    "FoldAccuracy",
    "FoldTar",
    "Gallery",
    "GallerySplit",
    "IdentificationResult",
    "MegafaceGallery",
    "MegafaceGalleryResults",
    "MegafaceLists",
    "MegafaceResult",
    "MegafaceSet",
    "OperatingCurve",
    "PairResult",
    "Pairs",
    "Ranking",
    "Recognition",
    "RocCurve",
    "ScoreSummary",
    "TarAtFar",
    "ThresholdAtFpir",
    "VerificationSet",
    "VerifiedIdentities",
    "WeightedL1Head",
    "cosine_pairs",
    "enroll",
    "equal_error_rate",
    "estimate_threshold",
    "find_pair_list",
    "fit_head",
    "identification",
    "identify_by_verification",
    "join_mirror",
    "kfold_accuracy",
    "lfw",
    "make_pairs",
    "megaface",
    "megaface_galleries",
    "read_arrays",
    "read_bin",
    "read_features",
    "read_lfw",
    "read_listed_features",
    "read_megaface",
    "read_megaface_lists",
    "read_ytf",
    "recognize",
    "roc",
    "search_gallery",
    "split_gallery",
    "stratified_folds",
    "summarize",
    "summarize_pairs",
    "tar_at_far",
    "unshuffled_folds",
    "weighted_l1_pairs",
    "ytf",
]
