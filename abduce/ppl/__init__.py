"""The language: sites, staging, the interpreter, traces and transformations."""
