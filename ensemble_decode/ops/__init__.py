"""Operators: one file each, with its docstring, schema, fake and dispatch; `reference` defines them all."""
