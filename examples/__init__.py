"""Networks trained on real data in several ways, and a table of each: `python -m examples.text`, `python -m examples.digits`."""
