"""What images are measured against, and what comes of it: ``python -m evaluation --help``."""
