"""Databases for tests of the store, on both backends: fixtures of `databases`."""

from databases import either_url, empty_file, postgres_database, postgres_url, store_url

__all__ = ["either_url", "empty_file", "postgres_database", "postgres_url", "store_url"]
