"""The tests of the evaluation need scikit-learn, but not the trainer."""

import pytest

pytest.importorskip("sklearn", reason="the evaluation's extra is not installed")
