"""Other libraries' ways of evaluating and saving, each in a module that imports that library."""
