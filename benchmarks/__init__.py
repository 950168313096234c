"""Side-by-side measurements of abduce against its peers. Never imported by tests.

See `benchmarks/README.md`; `python -m benchmarks.run` runs them all.
"""
