"""The tests of the evaluation need scikit-learn, and not the trainer."""

import pytest

pytest.importorskip("sklearn", reason="the evaluation's extra is not installed")
