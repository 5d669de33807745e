"""One verb per file: `python -m jobs.<verb> --recipe R [--set section.key=value]`."""
