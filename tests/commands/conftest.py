"""The tests of the commands use the fixtures of the trainer's tests."""

from trainer_fixtures import face_folder, one_thread, tiny_options  # noqa: F401
