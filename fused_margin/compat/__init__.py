"""Drop-in replacements for other libraries' losses, under their names, arguments and conventions."""
