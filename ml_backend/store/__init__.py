"""Stores tables in a database, and model versions in folders or a bucket."""
