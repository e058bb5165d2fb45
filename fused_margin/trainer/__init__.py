"""The reference trainer: from images of identities to a verification score."""
