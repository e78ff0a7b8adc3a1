"""The commands: each file parses its arguments, makes one call into the library and prints what it wrote."""
