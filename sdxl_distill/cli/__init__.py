"""The commands, one thin module each; nothing heavy is imported before a command runs."""
