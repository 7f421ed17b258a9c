"""Databases for tests of the store: fixtures of `databases` and `old_stores`."""

from databases import either_url, empty_file, postgres_database, postgres_url, store_url
from old_stores import first_store

__all__ = ["either_url", "empty_file", "first_store", "postgres_database", "postgres_url", "store_url"]
