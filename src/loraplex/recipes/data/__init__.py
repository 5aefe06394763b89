"""Data sets: read, turned into examples, tokenised, put together into tasks."""
