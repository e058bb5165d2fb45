"""The tests of the commands share the trainer's fixtures."""

from trainer_fixtures import face_folder, one_thread, tiny_options  # noqa: F401
