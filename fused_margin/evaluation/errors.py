"""The error that readers and protocols raise for unusable data."""


class DataError(ValueError):
    """The data do not allow the operation; the message names the file or array.

    Examples:
        >>> import numpy as np
        >>> from fused_margin.evaluation import DataError, FeatureSet
        >>> try:
        ...     FeatureSet(np.ones((2, 4))).require("labels")
        ... except DataError as error:
        ...     print(error)
        this protocol needs the array labels of a FeatureSet (an .npz file)
    """
