"""The tests of the trainer share its fixtures."""

from trainer_fixtures import (  # noqa: F401
    characters,
    face_folder,
    glyph_identities,
    one_thread,
    tiny_config,
    tiny_options,
)
